"""The page in a real browser and by its protocol: `make test-ui` installs gradio, and chromium where apt has it."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import arguments, environment

SHOT = Path(__file__).resolve().parents[2] / "build" / "ui.png"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("ui")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "zoft", "ui", f"port={port}"]
    with (folder / "served.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        try:
            for _ in range(300):
                assert process.poll() is None, (folder / "served.log").read_text()
                try:
                    urllib.request.urlopen(url, timeout=2).read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield url, folder
        finally:
            process.terminate()
            process.wait(timeout=30)


def fields(folder: Path) -> list[str]:
    """Values of the page's fields for a run of a second."""
    words = [word for word in arguments(folder, folder / "out") if not word.startswith(("output_dir", "model.name"))]
    return ["", str(folder / "model"), "", shlex.join(words), str(folder / "out")]


def test_the_protocol_drives_a_run_to_its_end(served: tuple[str, Path]):
    from gradio_client import Client

    url, folder = served
    client: Any = Client(url, verbose=False)
    command, message = client.predict(*fields(folder), api_name="/data")
    assert command.startswith("zoft data show model.name=")
    assert "train" in message
    command, message = client.predict(*fields(folder), api_name="/start")
    assert (message, command.split()[:2]) == ("begun", ["zoft", "train"])
    for _ in range(240):
        if (folder / "out" / "report.json").is_file():
            break
        time.sleep(0.5)
    message, _ = client.predict(api_name="/seen")
    chosen = client.predict(str(folder / "out"), api_name="/earlier")
    assert chosen[0] == str(folder / "out" / "config.yaml")
    assert "is finished: try it or export it" in str(chosen)
    assert (folder / "out" / "report.json").is_file(), message
    command, message = client.predict(str(folder / "out"), api_name="/export")
    assert (folder / "out" / "export" / "README.md").is_file(), message


def test_a_browser_shows_it_and_asks_nobody_else(served: tuple[str, Path]):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    url, _ = served
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1150"):
        options.add_argument(flag)
    # Every other host leads nowhere: the page has to work without them.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.binary_location = "/usr/bin/chromium"
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        driver.get(url)
        WebDriverWait(driver, 60).until(lambda d: d.find_elements(By.XPATH, "//button[contains(., 'See the rows')]"))
        driver.find_element(By.XPATH, "//button[contains(., 'See the rows')]").click()
        WebDriverWait(driver, 120).until(lambda d: "zoft data show" in d.find_element(By.TAG_NAME, "body").text)
        said = "return [...document.querySelectorAll('textarea')].some(t => t.value.includes('--- train, row 1'))"
        WebDriverWait(driver, 300).until(lambda d: d.execute_script(said))
        SHOT.parent.mkdir(exist_ok=True)
        driver.save_screenshot(str(SHOT))
    finally:
        driver.quit()
    assert SHOT.stat().st_size > 10_000
