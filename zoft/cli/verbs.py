"""The verbs of the command line, and what each does in a line."""

from __future__ import annotations

VERBS = {
    "train": "fine-tune a model (the one you came for)",
    "tune": "search a training job's settings: zoft tune config=quickstart space.optimizer.learning_rate='log(1,64)'",
    "check": "everything about a run before it begins, ticks and crosses: zoft check config=quickstart",
    "estimate": "memory of a run before any weight is loaded, time by three steps: zoft estimate config=quickstart",
    "eval": "metrics on held-out rows, of a model or a run: zoft eval run=runs/mine mode=icl",
    "predict": "labels with probabilities for new rows: zoft predict run=runs/mine data=new.csv",
    "generate": "what a model writes behind a prompt: zoft generate run=runs/mine prompt='Once upon'",
    "chat": "talk with a model, beside the one before training: zoft chat run=runs/mine --compare",
    "export": "a run as a folder with a model card, merged, as GGUF, or on the hub: zoft export run=runs/mine --merge",
    "compare": "runs beside each other, a table and a picture: zoft compare runs/quickstart-sweep",
    "plot": "a run's curve drawn again, also while it runs: zoft plot runs/mine",
    "ui": "one page in a browser that drives these commands: zoft ui",
    "bench": "methods x tasks x prompts x seeds at one budget, a table and pictures: zoft bench config=demo",
    "data": "see the data of a run as the model will: zoft data show task=custom task.train=my.jsonl",
    "ls": "list what can be chosen: zoft ls, zoft ls estimator",
    "show": "one choice in full: zoft show estimator/central, zoft show config/quickstart",
    "journal": "what a run's journal says, step by step: zoft journal show RUN; several as one: merge",
    "replay": "a run's weights at any step, from the base model and the journal: zoft replay RUN --to 100",
    "diff": "where two runs part: zoft diff RUN_A RUN_B",
    "attack": "adversarial examples against an image classifier that is only asked: zoft attack data=digits",
    "fetch": "bring the demo's model and data to the cache: zoft fetch sms-spam",
    "doctor": "check this installation: versions, devices, the cache, the speed of the noise",
    "completion": "print a bash script that completes zoft's arguments",
    "version": "print the version",
}
"""Verb -> what it does.

Each lives in the module of its name, whose ``command`` takes the words behind the verb, as its help names them, and
returns the exit code.
"""
