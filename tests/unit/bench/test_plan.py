"""A bench's plan: what its file and command line say, the cells they make, and the sentence for each mistake."""

import pytest

from zoft.bench.plan import Cell, RateSearch
from zoft.bench.reading import fill_in, read_plan
from zoft.errors import UserError

FILE = """
base: [config=smoke]
tasks: {a: [task=sms_spam], b: ["task=sms_spam", "task.data_seed=1"]}
methods: {mezo: 1e-3, mine: {learning_rate: 0.5, arguments: [method=mezo, estimator.eps=1e-2]}}
references: [zero_shot, icl, adamw]
seeds: [3, 4]
rates: [0.5, 2]
queries: 40
demonstrations: 2
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def test_cells_are_all_combinations(file):
    plan = read_plan([f"config={file}"])
    first = list(plan.cells())
    # 2 tasks x 2 prompts x (2 evaluations + 3 methods x 2 rates)
    assert len(first) == 2 * 2 * (2 + 3 * 2)
    assert len(set(first)) == len(first)
    assert {cell.seed for cell in first} == {None, 3}
    ended = RateSearch((0.5, 2.0), {plan.queries: 2.0})
    chosen = {(task, prompt, m): ended for task in "ab" for prompt in plan.prompts for m in plan.runs}
    cells = list(plan.cells(chosen))
    assert len(cells) == plan.num_cells == 2 * 2 * (2 + 3 * 3)
    assert {cell.factor for cell in cells if cell.seed == 4} == {2.0}
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_cell_is_arguments_of_zoft_train(file):
    plan = read_plan([f"config={file}", "trainer.max_grad_norm=9"])
    assert plan.arguments(Cell("b", "none", "mine", 2.0, 4)) == [
        *("config=smoke", "trainer.max_grad_norm=9", "task=sms_spam", "task.data_seed=1", "task.prompt=none"),
        *("method=mezo", "estimator.eps=1e-2", "seed=4", "budget.queries=40", "optimizer.learning_rate=1"),
    ]
    assert plan.arguments(Cell("a", "aligned", "icl"))[-2:] == ["mode=icl", "k=2"]
    assert "objective=classes" in plan.arguments(Cell("a", "head", "mezo", 1.0, 0))
    assert "method=adamw" in plan.arguments(Cell("a", "aligned", "adamw", 1.0, 0))


def test_the_command_line_wins_and_keeps_what_the_file_says_of_a_method(file):
    plan = read_plan([f"config={file}", "methods=[mine,fzoo]", "seeds=7", "references=[]", "target=0.3"])
    assert plan.runs == ["mine", "fzoo"]
    assert plan.seeds == [7]
    assert plan.target == 0.3
    assert plan.baseline == "mine"
    assert plan.methods["mine"].learning_rate == 0.5
    assert plan.methods["fzoo"].learning_rate is None
    assert plan.output_dir == "runs/bench-mine"


def test_a_task_that_the_file_does_not_know_is_the_task_of_that_name(file):
    plan = read_plan([f"config={file}", "tasks=[b, sst2]"])
    assert plan.tasks == {"b": ["task=sms_spam", "task.data_seed=1"], "sst2": ["task=sst2"]}


def test_a_list_of_methods_in_a_file_goes_with_one_on_the_command_line(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text("base: [config=smoke]\nmethods: [mezo, fzoo]\n")
    assert read_plan([f"config={file}", "methods=[mezo]", "references=[]"]).runs == ["mezo"]


def test_what_a_head_has_no_use_for_is_left_out():
    plan = read_plan(
        ["config=smoke", "methods=[mezo]", "references=[zero_shot, icl, calibrated]", "prompts=[head, none]"]
    )
    fill_in(plan)
    modes = [(cell.prompt, cell.method) for cell in plan.cells() if cell.seed is None]
    assert modes == [("head", "zero_shot"), ("none", "zero_shot"), ("none", "icl"), ("none", "calibrated")]


def test_an_experiment_is_a_bench_of_its_own_task():
    plan = read_plan(["config=smoke", "methods=[mezo]", "references=[lora]"])
    assert plan.queries == 0
    assert not plan.tasks
    fill_in(plan)
    assert list(plan.tasks) == ["sms_spam"]
    assert plan.queries == 20
    assert plan.methods["mezo"].learning_rate == 1e-6  # the preset's own
    assert "peft=lora" in plan.arguments(Cell("sms_spam", "none", "lora", 1.0, 0))


def test_references_keep_what_the_file_says_of_them():
    plan = read_plan(["config=demo", "methods=[mezo]"])
    assert plan.methods["backprop_whiten"].arguments == ["method=zoft", "estimator.feedback=exact"]
    assert plan.methods["lora"].learning_rate == 1e-2
    assert [name for name in plan.runs if name not in plan.references] == ["mezo"]


def test_budgets_are_below_that_of_the_runs():
    with pytest.raises(UserError, match="budgets must be below queries=60"):
        fill_in(read_plan(["config=demo", "queries=60"]))


def test_every_shipped_bench_can_be_read():
    from zoft.config.catalog import preset_files

    assert "demo" in preset_files("bench")
    for name in preset_files("bench"):
        plan = read_plan([f"config={name}"])
        assert len(plan.runs) >= 8
        assert len(plan.prompts) == 2
        assert len(plan.seeds) >= 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs config="),
        (["config=demmo"], "there is no bench called 'demmo'. Did you mean demo?"),
        (["config=demo", "--drawn"], "no flag '--drawn'"),
        (["config=demo", "seeds=[0,x]"], "seeds must be whole numbers, got 'x'"),
        (["config=demo", "seeds=[0,0]"], "seeds must be a list without repeated values"),
        (["config=demo", "rates=[0,1]"], "rates must be factors above 0"),
        (["config=demo", "budgets=[0,30]"], "budgets must be 1 or more"),
        (["config=demo", "budgets=[30,30]"], "budgets must be a list without repeated values"),
        (["config=demo", "queries=1.5"], "queries must be whole numbers, got 1.5"),
        (["config=demo", "select=dev"], "select must be loss or metric, got 'dev'"),
        (["config=demo", "methods=[mezzo]"], "there is no method called 'mezzo'. Did you mean mezo"),
        (["config=demo", "baseline=fzo"], "baseline=fzo is not among the methods"),
        (["config=demo", "seed=1"], "seed=1 (base): a bench sets that itself; its key is seeds"),
        (["config=demo", "trainer.eval_steps=5"], "its key is evaluations"),
        (
            ["config=demo", "methods={a: {arguments: [method=mezo, task.prompt=none]}}"],
            "(methods.a): a bench sets that",
        ),
        (["config=demo", "queries=.inf"], "queries must be whole numbers, got inf"),
        (["config=demo", "target=.nan"], "target must be numbers, got nan"),
        (["config=demo", "rates=[.inf]"], "rates must be numbers, got inf"),
        (["config=demo", "references=[icl,icl]"], "references must be a list without repeated values"),
        (["config=demo", "methods=[{mezo: 1}]"], "methods must be a list of words"),
        (["config=demo", "prompts=[]"], "prompts must be a list of at least one value"),
        (["config=demo", "budget.queries=9"], "its key is queries"),
        (["config=demo", "task=sst2"], "its key is tasks"),
    ],
)
def test_a_mistake_is_one_sentence(words, said):
    with pytest.raises(UserError) as error:
        read_plan(words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: [", "not readable as YAML"),
        ("- a", "a bench is a mapping"),
        ("methodz: {}\nseeds: [0]", "a bench has no key 'methodz'. Did you mean methods?"),
        ("methods: {mezo: {rate: 1}}", "methods.mezo has no key 'rate'"),
        ("methods: {mine: {arguments: [peft=lora]}}", "A method of your own names its parts"),
        ("methods: {mezo: -1}", "methods.mezo.learning_rate must be above 0"),
        ("tasks: {'a/b': []}", "'a/b' cannot name files"),
        ("tasks: {a: [task.words: {a: b}]}", "tasks.a must be a list of words"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, said):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_plan([f"config={file}"])
    assert said in str(error.value)


def test_a_task_that_cannot_be_composed_is_named_before_anything_runs(file):
    plan = read_plan([f"config={file}", "tasks={a: [task=sms_spam, task.num_trainn=3]}"])
    with pytest.raises(UserError, match=r"num_trainn.*\(in the cell a, prompt aligned, mezo\)"):
        fill_in(plan)


def test_a_value_that_a_run_would_choose_is_refused(file):
    plan = read_plan([f"config={file}", "base=[estimator.eps=auto]"])
    with pytest.raises(UserError, match=r"estimator.eps=auto is chosen by zoft train alone: give a value"):
        fill_in(plan)


def test_fault_10_the_exact_reference_begins_at_the_rate_of_the_method_it_is_compared_with():
    words = ["config=smoke", "references=[forward_gradient, adamw]"]
    rates = {}
    for methods in ("{mezo: 1e-3, fzoo: 1e-2}", "{fzoo: 1e-2}", "[mezo]", "{mezo: 1e-3, forward_gradient: 4e-3}"):
        plan = read_plan([*words, f"methods={methods}"])
        fill_in(plan)
        rates[methods] = plan.methods["forward_gradient"].learning_rate
    assert list(rates.values()) == [1e-3, 1e-2, 1e-6, 4e-3]
    assert plan.methods["adamw"].learning_rate != 1e-3  # not a step of the same kind: a rate of its own
