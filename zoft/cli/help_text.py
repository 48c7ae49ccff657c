"""The text of --help; assembled from file names, so it is true and quick."""

from __future__ import annotations

import importlib
import textwrap

from zoft.cli.verbs import VERBS
from zoft.config.catalog import ORDER, choices
from zoft.utils.terminal import fitted

TOP = """\
zoft: fine-tune language models with forward passes only (zeroth-order: no backward pass, the memory of inference).

usage: zoft <command> [arguments]

{verbs}

Start here:
  zoft train config=quickstart            a real model learns a real task, two minutes on 2 CPU cores
  zoft train config=classify task.train=reviews.csv    your own rows (also instruct, chat, preference, reward)
  zoft train --help                       the grammar, every choice, examples

Exit codes: 0 done; 1 the run failed; 2 something to mend in the arguments (one line says what);
75 stopped by SIGTERM or SIGUSR1, the same command goes on; 130 interrupted.
ZOFT_TRACEBACK=1 shows where an error comes from. ZOFT_CACHE is where fetched models and data live, and
the compiled noise. ZOFT_COMPILE=auto|always|never says whether noise is compiled (zoft doctor shows whether it is).
"""

TRAIN = """\
Fine-tune a model with forward passes only.

usage: zoft train [config=NAME_OR_PATH] [group=choice]... [key=value]... [-m] [--cfg]

A run is a set of parts, one of each group, and their settings. `group=choice` picks a part, `key=value` sets one of
its keys. config= starts from an experiment: a name below, or the path of your own YAML file. Later wins:
train.yaml, then config=, then method=, then everything else you write (in any order).

Groups and choices (zoft show GROUP/CHOICE says what one does and lists its settings):
{groups}

Keys:
  seed=1                                  directions, order of rows, an adapter's first weights
  output_dir=runs/mine                    the run's folder (default: runs/<config>-seed<seed>, and other arguments)
  budget.queries=4000                     forward passes of the objective; training stops when they are used up
  estimator.eps=1e-2                      a setting of a part: <group>.<setting>
  optimizer.learning_rate=1e-6            the step size
  trainer.per_device_train_batch_size=8   any field of transformers.TrainingArguments, by its own name

Flags:
  -m, --multirun    a sweep: one run for every combination of the values given as key=a,b,c
  --cfg             print the whole run as YAML, checked, and stop; keep it as mine.yaml, run it with config=mine.yaml
  -h, --help        this text

Examples:
  zoft train config=quickstart                                  the demo
  zoft train config=quickstart seed=1 budget.queries=120        twice the training, another seed
  zoft train config=quickstart peft=lora                        train a LoRA adapter instead
  zoft train config=classify task.train=mail.csv                your own rows; also instruct, chat, preference, reward
  zoft train model.name=Qwen/Qwen3-0.6B task=sst2 method=mezo optimizer.learning_rate=1e-6
  zoft train config=./mine.yaml output_dir=runs/mine            your own experiment
  zoft train config=runs/mine/config.yaml output_dir=runs/two   a run again, exactly
  zoft train config=classify task.train=mail.csv 'task.template="{{text}} Spam?"' 'task.words={{ham: No, spam: Yes}}'
  zoft train -m config=quickstart seed=0,1,2 optimizer.learning_rate=1e-6,1e-5 launcher=joblib
  torchrun --nproc-per-node 2 -m zoft train config=quickstart   two processes, twice the batch
  torchrun --nproc-per-node 2 -m zoft train config=quickstart method=es trainer.parallel=directions   half of its points

Your own experiment is a YAML file; parts are chosen under `defaults`, everything else is a key:
  # @package _global_
  defaults:
    - override /task: sms_spam
    - override /estimator: one_sided
  estimator: {{num_directions: 4}}
  optimizer: {{learning_rate: 1e-5}}
It can live anywhere (config=path/to/mine.yaml) or in ./configs (config=mine).

Results: output_dir holds config.yaml (the whole run), metrics.csv and metrics.jsonl, a learning curve, the final model
or adapter and a report; nothing is written anywhere else (but a large run's compiled noise, to the cache). A sweep's
cells are output_dir/<key=value,...>.
Exit codes: 0 done; 1 the run failed (non-finite loss); 2 something to mend (one line says what);
75 stopped by SIGTERM or SIGUSR1, the same command goes on; 130 interrupted (and the same command goes on as well).
"""

OTHER = {
    "eval": (
        "usage: zoft eval [config=NAME_OR_PATH] [run=DIR] [mode=MODE] [k=N] [split=test] [evaluate=METRIC] [--json]\n"
        "       [group=choice]... [key=value]...\n"
        "       zoft eval [config=NAME_OR_PATH] [run=DIR] harness=TASKS [harness_path=DIR] [harness_limit=N] [k=N]\n\n"
        "Computes the task's metric with its 95 % interval on held-out rows, and writes predictions.jsonl and\n"
        "evaluation.json. The model is the one that the arguments (those of zoft train) describe; with run=DIR it is\n"
        "that run's final one, and the arguments are the run's own unless config= says otherwise.\n\n"
        "mode=zero_shot     the model as it is (the default; of a run's model the result is called `trained`)\n"
        "mode=icl           behind k solved rows (32), another set for each row\n"
        "mode=calibrated    options against a prompt without content (surface-form competition); k adds solved rows\n"
        "mode=linear_probe  logistic regression on the model's last hidden states, trained on the training rows\n\n"
        "split=test|dev|train. evaluate=METRIC adds a metric of the `evaluate` library (its name, or its folder).\n"
        "metric=pass@1,pass@8   for texts: how likely one of k samples is right (objective.num_samples=8 or more,\n"
        "                       objective.temperature above 0); right is an exact match, or a reward of pass_reward=1\n"
        "Rows with the same few labels get precision, recall and F1 of each, and what each was taken for.\n"
        "Without output_dir= the files go to DIR/eval-MODE-SPLIT or <output_dir>-eval-MODE-SPLIT.\n\n"
        "harness=NAME,...   tasks of EleutherAI's lm-evaluation-harness instead (pip install 'zoft[harness]'), or\n"
        "                   task files (.yaml), whose `!function` lines run the Python beside them\n"
        "harness_path=DIR   a folder of task files that can be named\n"
        "harness_limit=N    the first N rows of each task\n"
        "k=N                solved rows before each; left out, what the task says\n\n"
        "Examples:\n"
        "  zoft eval config=quickstart\n"
        "  zoft eval config=quickstart mode=icl k=8\n"
        "  zoft eval run=runs/quickstart-seed0 --json\n"
        "  zoft eval run=runs/quickstart-seed0 harness=hellaswag,arc_easy harness_limit=200"
    ),
    "tune": (
        "usage: zoft tune [config=NAME_OR_PATH] [group=choice]... [key=value]... space.KEY=RANGE... [budget=N]\n\n"
        "Searches for the settings at which a training job's dev loss is lowest, by a zeroth-order search over the\n"
        "unit cube (docs/tune.md). Each point is a `zoft train` of its own, in output_dir/NUMBER; arguments that are\n"
        "not listed here are that job's. It is stopped and goes on with the same command.\n\n"
        "Ranges, of any key of the config:\n"
        "  space.optimizer.learning_rate='log(1e-5,1e-1)'    a real number, evenly in its logarithm\n"
        "  space.optimizer.weight_decay='uniform(0,0.1)'     a real number\n"
        "  space.estimator.num_directions='int(1,8)'         a whole number, both ends included\n"
        "  space.trainer.per_device_train_batch_size='logint(1,64)'\n"
        "  space.trainer.lr_scheduler_type='choice(constant,linear)'\n\n"
        "Settings of the search:\n"
        "  budget=40           training jobs, all together\n"
        "  repeats=1           jobs of each point, with seeds one apart; their mean counts\n"
        "  workers=1           jobs at the same time, each in a process\n"
        "  metric=eval_loss    the number that counts: eval_accuracy, eval_perplexity, loss, ...\n"
        "  direction=minimize  or maximize; left out, accuracy, F1, exact match and reward are maximised\n"
        "  search=zo           or random, or tpe (Optuna's; for spaces of many choices)\n"
        "  stop_early=true     a job that is worse at half than the median of the earlier ones is stopped there\n"
        "  seed=0              of the search, and of the jobs\n"
        "  output_dir=DIR      default runs/CONFIG-tune-seedSEED: journal.jsonl, results.json, tune.png, the jobs\n\n"
        "Examples:\n"
        "  zoft tune config=quickstart space.optimizer.learning_rate='log(1,64)'\n"
        "  zoft tune config=mine.yaml space.optimizer.learning_rate='log(1e-7,1e-4)' budget=20 workers=4 repeats=2\n\n"
        "Exit codes: 0 done; 1 no job came to its end; 2 something to mend (one line says what); 75 stopped by\n"
        "SIGTERM and 130 interrupted: the same command goes on."
    ),
    "bench": (
        "usage: zoft bench config=NAME_OR_PATH [key=value]... [group=choice]... [--plan [--time]] [--draw]\n"
        "       zoft bench output_dir=DIR [--draw]\n\n"
        "Runs every method on every task with every prompt and seed at one budget of queries, beside the references,\n"
        "and writes bench.md, bench.csv (a row a cell) and pictures. config= is a file of configs/bench,\n"
        "a path, or an experiment of `zoft train`, which then is a bench of its task. Start the same command on as\n"
        "many machines as you like that share output_dir: each takes the cells that nobody has. Stopped, it goes on\n"
        "with the same command; a cell that was cut off goes on from its journal.\n\n"
        "Keys, in the file or here:\n"
        "  methods=[mezo,fzoo]     names of configs/method; in the file with learning_rate and arguments of their own\n"
        "  tasks={...}             name -> arguments that choose the task\n"
        "  prompts=[aligned,none]  task.prompt: the template, the raw text and the answers, or head\n"
        "  seeds=[0,1,2]           the first one chooses the learning rate\n"
        "  queries=N               budget of each run (default: the experiment's)\n"
        "  budgets=[30,60]         smaller ones that every run is judged at, too, with a rate of its own for each\n"
        "  rates=[0.25,0.5,1,2,4]  times a method's learning rate; the dev rows choose, the other seeds run\n"
        "  grow=2                  how many more rates are tried beyond the edge where the best one lies\n"
        "  references=[zero_shot,icl,forward_gradient,adamw,lora]   also calibrated, linear_probe, other methods\n"
        "  demonstrations=8        of icl\n"
        "  evaluations=8           on the dev rows along a run; the best one's weights are tested\n"
        "  select=loss             or metric: what the dev rows choose by\n"
        "  baseline=mezo           whose dev loss queries are counted to, or target=0.4\n"
        "  jobs=1                  processes on this machine\n"
        "  base=[...]              arguments of `zoft train` for every cell; others you write are added to them\n"
        "  output_dir=DIR          default runs/bench-NAME\n\n"
        "  --plan   print what would be run, and a cell's command, and stop; with --time also how long training of\n"
        "           all cells will take, by three steps of the first\n"
        "  --draw   table and pictures of the cells that are there\n"
        "The folder alone (output_dir=DIR) draws, or goes on with, the bench that was last run in it.\n\n"
        "Examples:\n"
        "  zoft bench config=demo jobs=2\n"
        "  zoft bench config=quickstart 'methods={mezo: 1e-3, fzoo: 1e-2}' references=[zero_shot] --plan\n\n"
        "Exit codes: 0 done; 1 cells failed (their reasons are in output_dir/failed; they are tried again next time);\n"
        "2 something to mend; 75 stopped by SIGTERM and 130 interrupted: the same command goes on."
    ),
    "data": (
        "usage: zoft data show [config=NAME_OR_PATH] [group=choice]... [key=value]... [--rows N] [--json]\n\n"
        "Reads and checks the data of the run that these arguments describe (those of zoft train) and prints, for\n"
        "train, dev and test, how many rows there are, their lengths in tokens, how many tokens count in the loss,\n"
        "what is cut at task.max_length and how often each label stands there; then the first N rows (3) as the\n"
        "model will see them: text, tokens, and a ^ under each token that counts. Only the tokenizer is loaded.\n\n"
        "Your own data needs no code: task=custom reads json, jsonl, csv, tsv, parquet or a hub dataset and finds by\n"
        "the columns what it is: text + label, multiple choice, prompt + completion, chat messages, preference pairs,\n"
        "or prompt + reward (zoft show task/custom).\n\n"
        "Examples:\n"
        "  zoft data show config=quickstart\n"
        "  zoft data show config=chat task.train=chats.jsonl --rows 1"
    ),
    "ls": (
        "usage: zoft ls [group]\n"
        "       zoft ls FILE.py\n\n"
        "Lists groups and their choices, with what each is for; also those of ./configs and of plugins. A Python\n"
        "file of your own: the parts that it defines, as they are chosen."
    ),
    "show": (
        "usage: zoft show GROUP/CHOICE   (or CHOICE alone where it is unambiguous, GROUP, or a config's section)\n"
        "       zoft show FILE.py:Class\n\n"
        "What a part does, its settings with type, default and meaning, and where it was published; a preset's file.\n"
        "zoft show trainer, precision, budget, tracker, diagnostics, model: every key, its type, default and meaning;\n"
        "zoft show trainer.eval_steps, estimator.eps, seed: one key."
    ),
    "journal": (
        "usage: zoft journal show RUN [--json] [--all]\n"
        "       zoft journal merge RUN RUN... --output DIR [--as mean|sum] [--fold]\n\n"
        "RUN is a run's folder or a journal file. Prints what the run is and its steps (the first and last 20; --all\n"
        "for every one): queries, loss, |projected gradient|, learning rate, eps, coefficients. --json prints one\n"
        "object a line. A finished run's journal is sealed: losses and slopes are then in metrics.csv alone.\n\n"
        "merge makes one journal of those of workers that began at the same base with the same method (optimizer=sgd,\n"
        "no decay): the mean of their models, or the sum of all steps. Coefficients of one direction are added up;\n"
        "--fold puts all of them into as few steps as hold them. zoft replay DIR --output MODEL makes the model."
    ),
    "replay": (
        "usage: zoft replay RUN [GROUP=FILE.py:Class]... [--to STEP] [--output DIR]\n\n"
        "Rebuilds the weights after STEP steps (all if left out) from the base model and RUN/journal.bin,\n"
        "without data and without a forward pass, compares them with the hashes in the journal, and prints theirs.\n"
        "With --output the model or adapter is saved. RUN needs config.yaml and journal.bin, nothing else: they are\n"
        "all that one has to send to share a fine-tuned model. A part from a file of one's own is named here too."
    ),
    "diff": (
        "usage: zoft diff RUN_A RUN_B\n\n"
        "Compares the settings and the steps of two journals and says where they part. Exit code 0 if they are the\n"
        "same, 1 if not."
    ),
    "attack": (
        "usage: zoft attack [data=digits|fashion_mnist] [key=value]... [--json]\n"
        "       zoft attack model=HUB_NAME_OR_FOLDER image=FILE [label=NAME] [key=value]... [--json]\n\n"
        "Looks for a small change of an image that changes a classifier's label, from its answers alone: no gradients\n"
        "and no weights; every image that the classifier is asked about is a query. For testing your own models.\n"
        "data= trains a small network on the spot; model= is any image classifier of transformers.\n\n"
        "  norm=linf radius=0.2     bound on the change, pixels are in [0, 1]: linf (largest pixel) or l2\n"
        "  method=flips             flips, squares, greedy: searches made for images; sign, coordinate, random: the\n"
        "                           estimators and optimizers of zoft; minimize: zoft.minimize left alone\n"
        "  subspace=pixels          or square, low_frequency, with grid=7: 7 x 7 numbers for each channel\n"
        "  budget=1000              most queries for an image\n"
        "  images=50 first=0        which images of the data\n"
        "  target=NAME              the label that is wanted; any but the right one if left out\n"
        "  loss=margin              or cross_entropy\n"
        "  num_directions= eps=R learning_rate=R   of method=sign, coordinate, random; R in units of the bound\n"
        "  seed=0                   random choices; the same command gives the same images\n"
        "  folder=DIR               Fashion-MNIST's files, where not in /usr/share/datasets/fashion-mnist\n"
        "  output_dir=DIR           default runs/attack-...: results.json, images.npz, triplets.png, curve.png\n\n"
        "Examples:\n"
        "  zoft attack data=digits norm=linf radius=0.2 images=50 budget=1000\n"
        "  zoft attack data=fashion_mnist method=squares norm=l2\n"
        "  zoft attack model=google/vit-base-patch16-224 image=cat.png radius=8/255 budget=5000"
    ),
    "fetch": (
        "usage: zoft fetch [NAME]...\n\n"
        "Brings models and data of the demo to the cache ($ZOFT_CACHE); without a name, lists them."
    ),
    "doctor": (
        "usage: zoft doctor [--json]\n\n"
        "Checks this installation, one line each: a tick for what is well, a cross for what keeps zoft from working,\n"
        "a dash for what could be better. Exit code 0 without a cross, 1 with one. --json prints it for machines.\n\n"
        "The noise that perturbs the weights is compiled here as a large run would compile it, compared bit by bit\n"
        "with the eager one, and timed; the compiled code is kept in the cache folder. A run compiles its noise where\n"
        "it trains enough for that to pay; ZOFT_COMPILE=always or never decides otherwise. The numbers are the same."
    ),
    "completion": 'usage: zoft completion\n\nPrints a bash script. For this shell: eval "$(zoft completion)"',
    "version": "usage: zoft version",
}


def of(verb: str | None) -> str:
    """The help of a verb, or of zoft itself, for the terminal at hand."""
    return fitted(_text(verb))


def _text(verb: str | None) -> str:
    if verb == "train":
        return TRAIN.format(groups=_groups())
    if verb in OTHER:
        return OTHER[verb]
    if verb in VERBS:
        return str(importlib.import_module(f"zoft.cli.{verb}").HELP).rstrip()
    width = max(map(len, VERBS))
    return TOP.format(verbs="\n".join(f"  {name:{width}}  {what}" for name, what in VERBS.items()))


def _groups() -> str:
    width = max(map(len, ORDER))
    lines = []
    for group in ORDER:
        names = " ".join(choices(group, plugins=False))
        indent = " " * (width + 4)
        lines += textwrap.wrap(names, 118, initial_indent=f"  {group:{width}}  ", subsequent_indent=indent)
    return "\n".join(lines)
