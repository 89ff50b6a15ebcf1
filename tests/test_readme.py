"""README.md's Python blocks run as they stand, a copied SAM class runs alone, and what the README says of it holds."""

import ast
import contextlib
import copy
import csv
import importlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import common
from common import SAM, frozen_bn_stats

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LOOP = "loss_fn(model(x), y).backward()\n    sam.perturb()"


def run_blocks(patch, folder):
    """The namespace after all blocks, run in order as torchrun would start them."""
    with warnings.catch_warnings(), socket.socket() as port:
        patch.chdir(folder)
        warnings.simplefilter("error")  # a scheduler that complains of its place, say
        warnings.filterwarnings("ignore", message=".*barrier.*|.*device_id.*")
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.getsockname()[1], "RANK": 0, "WORLD_SIZE": 1}
        for key, value in address.items():
            patch.setenv(key, str(value))
        port.close()
        torch.manual_seed(0)
        names = {"__name__": "readme"}
        try:
            for block in BLOCKS:
                run_block(block, names)
                assert all(p.isfinite().all() for p in names["model"].parameters()), block
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return names


def run_block(block, names):
    start = README[: README.index(block)].count("\n")
    exec(compile("\n" * start + block, ROOT / "README.md", "exec"), names)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield run_blocks(patch, tmp_path_factory.mktemp("readme"))


def block_with(text):
    (block,) = [block for block in BLOCKS if text in block]
    return block


def test_every_block_runs(blocks):
    assert LOOP in BLOCKS[0]
    assert all("with frozen_bn_stats" in block for block in BLOCKS if "perturb()" in block)


def test_with_activation_checkpointing_the_second_pass_moves_no_statistics(monkeypatch, tmp_path):
    """Each backward pass runs the model's forward pass again, so the second one must be inside of frozen_bn_stats."""
    forward = nn.Sequential.forward
    frozen = []  # (model, its buffers before the second pass)
    compared = []

    @contextlib.contextmanager
    def watched(model):
        frozen.append((model, [buffer.clone() for buffer in model.buffers()]))
        with frozen_bn_stats(model):
            yield

    class Watched(SAM):
        def restore(self):
            for model, before in frozen:
                assert all(map(torch.equal, before, model.buffers()))
                compared.append(model)
            frozen.clear()
            super().restore()

    def checkpointed(model, x):
        return checkpoint(forward, model, x, use_reentrant=False)

    monkeypatch.setattr(nn.Sequential, "forward", checkpointed)
    monkeypatch.setattr(common, "SAM", Watched)
    monkeypatch.setattr(common, "frozen_bn_stats", watched)
    names = run_blocks(monkeypatch, tmp_path)
    x, y = names["loader"][0]
    lightning_step(names, names["model"], x, y)
    trainer_step(names, names["model"], x, y)
    loops = [block for block in BLOCKS if "for x, y in loader" in block]
    assert len(compared) == 4 * len(loops) + 2


def test_no_backward_pass_runs_under_autocast():
    for block in BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.With) and "autocast" in ast.unparse(node.items[0]):
                assert "backward" not in ast.unparse(node), block


def test_gradscaler_skips_a_first_step_that_overflows(blocks):
    """The other steps then equal those of float32 without a scaler, but for float16's precision."""
    torch.manual_seed(0)
    model = rebuilt()
    expected = rebuilt()
    loader = [(torch.randn(32, 20), torch.randint(3, (32,))) for _ in range(4)]
    stepped = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: stepped.append(optimizer))
    first_overflows = "GradScaler(device, init_scale=2.0**127, backoff_factor=2.0**-115)"
    block = block_with("GradScaler(device)").replace("GradScaler(device)", first_overflows)
    try:
        exec(block, blocks | {"model": model, "loader": loader})
    finally:
        hook.remove()
    assert len(stepped) == 3

    sam = SAM(torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9))
    for x, y in loader[1:]:
        two_passes(expected, sam, x, y)
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_with_two_optimizers_both_take_the_gradient_at_w_plus_e():
    """SAM around one of them, the other cleared after `perturb()`, as README says: one step of it against
    torch.autograd.grad at w and at w + e, with e written out."""
    model = rebuilt().double()
    x, y = torch.randn(32, 20, dtype=torch.float64), torch.randint(3, (32,))
    weights = dict(model.named_parameters())
    on_backbone = {name: not name.startswith("3.") for name in weights}

    def gradients(values):
        loss = F.cross_entropy(torch.func.functional_call(copy.deepcopy(model), values, (x,)), y)
        return dict(zip(values, torch.autograd.grad(loss, list(values.values()))))

    first = gradients(weights)
    norm = sum(g.square().sum() for name, g in first.items() if on_backbone[name]).sqrt()
    moved = {name: w + 0.05 * first[name] / norm * on_backbone[name] for name, w in weights.items()}
    second = gradients(moved)
    expected = {name: w - (0.1 if on_backbone[name] else 0.01) * second[name] for name, w in weights.items()}
    expected = {name: w.detach() for name, w in expected.items()}

    sam = SAM(torch.optim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9))
    head_optimizer = torch.optim.SGD(model[3].parameters(), lr=0.01)
    F.cross_entropy(model(x), y).backward()
    sam.perturb()
    head_optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sam.step()
    head_optimizer.step()
    for name, w in model.named_parameters():
        torch.testing.assert_close(w.detach(), expected[name], rtol=0, atol=1e-12)


def source_of(name):
    text = (ROOT / "common.py").read_text(encoding="utf-8")
    (node,) = (n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    return ast.get_source_segment(text, node)


def test_the_class_needs_nothing_but_torch():
    names = {"torch": torch}
    exec(source_of("SAM"), names)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    sam = names["SAM"](torch.optim.SGD([w], lr=0.1), rho=1.0, adaptive=False)
    (w @ w / 2).backward()
    sam.perturb()
    torch.testing.assert_close(w.detach(), torch.tensor([3.6, 4.8]))
    (w @ w / 2).backward()
    sam.step()
    torch.testing.assert_close(w.detach(), torch.tensor([2.64, 3.52]))


def test_the_readme_states_the_length_of_the_class():
    source = source_of("SAM")
    docstring = ast.get_docstring(ast.parse(source).body[0], clean=False)
    code = [line for line in source.replace(docstring, "").splitlines() if line.strip(' "')]
    assert re.findall(r"`SAM` \((\d+) lines of code\)", README) == [str(len(code))] and len(code) <= 50


def rebuilt():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def two_passes(model, sam, x, y):
    sam.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sam.perturb()
    with frozen_bn_stats(model):
        F.cross_entropy(model(x), y).backward()
    sam.step()


def lightning_step(blocks, model, x, y):
    """A step of README's LightningModule, whose methods are called as the real Trainer does."""
    module = blocks["Classifier"](model)
    assert module.automatic_optimization is False
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()
    module.training_step((x, y), 0)


def trainer_step(blocks, model, x, y):
    """A step of README's subclass of a Hugging Face Trainer, here of a stand-in for it."""

    class Trainer:
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = F.cross_entropy(model(inputs["x"]), inputs["labels"])
            loss.backward()
            return loss.detach()

    trainer = type("SAMTrainer", (blocks["TwoPasses"], Trainer), {})()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer.optimizer.zero_grad()
    trainer.training_step(model, {"x": x, "labels": y}, None)
    trainer.optimizer.step()


@pytest.mark.parametrize("step", [lightning_step, trainer_step])
def test_steps_inside_of_frameworks_equal_the_plain_loop(blocks, step):
    x, y = torch.randn(32, 20), torch.randint(3, (32,))
    plain, framed = rebuilt(), rebuilt()
    two_passes(plain, SAM(torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)), x, y)
    step(blocks, framed, x, y)
    for (name, ours), theirs in zip(plain.state_dict().items(), framed.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_a_thousand_steps_restore_bit_for_bit_in_the_same_storage():
    for dtype, steps in ((torch.float32, 1000), (torch.bfloat16, 200)):
        model = rebuilt().to(dtype)
        before, places = [p.detach().clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0))
        for _ in range(steps):
            two_passes(model, sam, torch.randn(16, 20, dtype=dtype), torch.randint(3, (16,)))
        assert all(map(torch.equal, before, model.parameters()))
        assert [p.data_ptr() for p in model.parameters()] == places


# Command blocks, commands within the text, and recipes

SHELL = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
DIFFS = re.findall(r"^```diff\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
NOT_HERE = {  # first words of a block: why no test executes it
    "git clone": "needs the network",
    "torchrun": "several GPUs and nodes; tests/test_distributed.py has two processes on a CPU",
}


@pytest.fixture
def clone(tmp_path):
    """A copy of the repo without results."""
    for name in ("*.py", "run.sh", "requirements.txt"):
        for path in ROOT.glob(name):
            shutil.copy(path, tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mini").symlink_to(ROOT / "data" / "mini")
    return tmp_path


def call(folder, *command):
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("results/*/*.json"))]


def test_every_command_block_is_executed_or_named():
    executed = [block for block in SHELL if block.startswith(("python label_noise.py", "#!/bin/bash"))]
    named = [block for block in SHELL if block.startswith(tuple(NOT_HERE))]
    assert len(executed) == 2 and len(named) == len(NOT_HERE) and len(executed) + len(named) == len(SHELL)


def test_the_first_commands_train_and_draw(clone):
    (block,) = [block for block in SHELL if block.startswith("python label_noise.py")]
    for line in block.splitlines():
        call(clone, sys.executable, *line.replace("--epochs 30", "--epochs 1").split()[1:])
    assert len(results(clone)) == 4 and (clone / "figures" / "front.png").exists()


def test_the_slurm_script_runs_its_line(clone):
    (block,) = [block for block in SHELL if block.startswith("#!/bin/bash")]
    place = clone / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "activate").write_text(f"PATH={shlex.quote(str(place))}:$PATH\n")
    (place / "python").write_text('#!/bin/sh\necho python "$@"\n')
    (place / "python").chmod(0o755)
    (clone / "job.sh").write_text(block)
    lines = call(clone, "bash", "run.sh", "list").splitlines()
    for task in (1, len(lines)):
        command = ["env", f"SLURM_ARRAY_TASK_ID={task - 1}", "OFFSET=1", "bash", "job.sh"]
        assert call(clone, *command).strip() == lines[task - 1].strip()


COMMANDS = [
    c
    for c in re.findall(r"`(python \w+\.py [^`]*)`", README)
    if not c.startswith(("python SCRIPT", "python tests", "python plot.py", "python mlp_width.py --optimizer"))
]
COMMANDS += [line for block in SHELL for line in re.findall(r"\w+_width\.py .*", block)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_within_the_text_parse(command, monkeypatch):
    argv = command.replace("$SEEDS", "--seed 0 1 2").removeprefix("python ").split()
    monkeypatch.setattr(sys, "argv", argv)
    parsed = []
    monkeypatch.setattr(
        common, "main", lambda parser, train, settings_of: parsed.extend(common.parse(parser, settings_of))
    )
    path = ROOT / argv[0]
    names = {"__name__": "__main__", "__file__": str(path)}
    importlib.invalidate_caches()
    exec(compile(path.read_text(), path, "exec"), names)
    assert parsed


def apply(folder, diff):
    """Makes a diff block's changes, each of which must fit one place, to the file that its first line names (first)."""
    head, *hunks = diff.split("@@\n")
    source, *target = head.split()[1:]
    text = (folder / source).read_text()
    for hunk in hunks:
        old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] != "+")
        new = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] != "-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / (target or [source])[0]).write_text(text)


TINY = "--data-dir data/mini --train-size 200 --epochs 1 --device cpu".split()


def test_the_recipe_of_an_optimizer(clone):
    argv = [sys.executable, "mlp_width.py", "--hidden", "9-7", *TINY]
    call(clone, *argv)
    before = (clone / "results" / "mlp_width").glob("*.json").__next__().read_bytes()
    apply(clone, DIFFS[0])
    assert "1 already finished" in call(clone, *argv)  # an older result stays valid
    for more in ([], ["--sam"]):
        call(clone, *argv, "--optimizer", "adamw", "--lr", 0.001, *more)
    found = {(r["config"].get("optimizer", "sgd"), r["config"]["sam"]): r["train_loss"] for r in results(clone)}
    assert len(found) == len(set(found.values())) == 3
    assert before in [path.read_bytes() for path in (clone / "results" / "mlp_width").glob("*.json")]
    call(clone, sys.executable, "plot.py")
    text = (clone / "figures" / "summary.csv").read_text()
    assert re.search(r'^"MNIST, MLP[^"]*optimizer adamw[^"]*",9-7,', text, re.MULTILINE)


def test_the_recipe_of_a_model(clone):
    apply(clone, DIFFS[1])
    for more in ([], ["--sam"]):
        call(clone, sys.executable, "cnn_width.py", "--width", 4, 8, *TINY, *more)
    found = results(clone)
    assert [path.name for path in (clone / "results").iterdir()] == ["cnn_width"] and len(found) == 4
    assert {r["num_params"] for r in found} == {c * (25 + 1 + 2 + 160) + 10 for c in (4, 8)}
    call(clone, sys.executable, "plot.py")
    assert (clone / "figures" / "gain_by_width.png").exists()
    text = (clone / "figures" / "summary.csv").read_text()
    assert len(re.findall(r'^("MNIST, cnn_width[^"]*"),[48],.*,gain,', text, re.MULTILINE)) > 2
    assert len(set(re.findall(r'^("MNIST, cnn_width[^"]*"),', text, re.MULTILINE))) == 1  # one sweep of two widths


def test_the_recipe_of_a_data_set(clone):
    apply(clone, DIFFS[2])
    call(clone, sys.executable, "mlp_width.py", "--hidden", "9-7", "--dataset", "Parity", "--epochs", 1)
    (result,) = results(clone)
    assert result["config"]["dataset"] == "parity" and result["num_params"] == 10 * 9 + 9 + 9 * 7 + 7 + 7 * 2 + 2


def test_the_recipe_of_a_figure(clone):
    apply(clone, DIFFS[3])
    for more in ([], ["--sam"]):
        call(clone, sys.executable, "mlp_width.py", "--hidden", "9-7", "18-14", *TINY, *more)
    call(clone, sys.executable, "plot.py")
    assert (clone / "figures" / "training_loss.png").exists()
    assert len(DIFFS) == 4


# Its results, and those of results/README.md

EVIDENCE = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "figures" / "overnight"
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"


@pytest.fixture(scope="module")
def rows():
    """The rows of the shipped summary.csv."""
    with open(SHIPPED / "summary.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_summary_is_that_of_the_shipped_files(tmp_path):
    call(ROOT, sys.executable, "plot.py", "--results", "results/overnight", "--figures", tmp_path)
    for name in ("summary.csv", "summary.md"):
        shipped = (SHIPPED / name).read_text(encoding="utf-8")
        drawn = (tmp_path / name).read_text(encoding="utf-8")
        assert re.sub(NUMBER, "#", shipped) == re.sub(NUMBER, "#", drawn)
        for one, other in zip(re.findall(NUMBER, shipped), re.findall(NUMBER, drawn)):
            unit = 10.0 ** -len(one.partition(".")[2]) if "." in one else 0  # machines round differently
            assert abs(float(one) - float(other)) <= max(1.01 * unit, 1e-5 * abs(float(one)), 1e-12), (one, other)
    assert {path.name for path in SHIPPED.iterdir()} == {path.name for path in tmp_path.iterdir()}


def same(text, number):
    """Whether a printed number is this one, rounded to as many digits; an exact half may go either way."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - number) <= 0.5000001 * 10.0**-digits + 1e-5 * abs(number)


@pytest.mark.parametrize("page", [README[: README.index("\n## Use SAM")], EVIDENCE], ids=["README", "results/README"])
def test_every_interval_is_in_the_summary_and_starred_where_it_includes_zero(page, rows):
    known = [(float(row["mean"]), float(row["half_interval"])) for row in rows if row["half_interval"]]
    found = re.findall(rf"([+-]?{NUMBER}) ± ({NUMBER})(\\\*)?", page)
    assert len(found) > 20
    for mean, half, star in found:
        signed = mean[0] in "+-"  # a gain or a slope
        matches = [one for one in known if same(mean, one[0] if signed else abs(one[0])) and same(half, one[1])]
        assert matches, f"{mean} ± {half}"
        if signed:
            assert bool(star) in {abs(m) <= h for m, h in matches}, f"{mean} ± {half}{star}"


def values_of(rows, measure, epochs, rule):
    """A measure by width, half of the labels flipped."""
    sweep = f"MNIST, MLP 3:1, 50% flipped, {epochs}10,000 images, 5,000 held out"
    found = {}
    for row in rows:
        if (row["sweep"], row["rule"], row["measure"], row["rho"]) == (sweep, rule, measure, "") and row["width"]:
            found[row["width"]] = float(row["mean"])
    return [found[width] for width in ("75-25", "150-50", "300-100", "1200-400")]


def test_the_accuracies_that_the_pages_list_are_the_summarys(rows):
    for measure, epochs in (("SGD", 12), ("SAM", 24), ("SAM", 60), ("SGD", 60)):
        values = values_of(rows, measure, f"{epochs} epochs, ", "last")
        assert ", ".join(f"{value:.1f}" for value in values) in EVIDENCE, (measure, epochs)
    sgd = values_of(rows, "SGD", "12 epochs, ", "last")
    long = values_of(rows, "SAM", "60 epochs, ", "last")
    short = values_of(rows, "SAM", "24 epochs, ", "last")
    for values in zip(sgd, long, short):
        assert "| " + " / ".join(f"{value:.1f}" for value in values) + " |" in README


def test_the_chosen_radii_and_epochs_that_the_pages_list_are_the_summarys(rows):
    for measure in ("best rho", "epochs of SGD", "epochs of SAM"):
        chosen = ", ".join(f"{value:g}" for value in values_of(rows, measure, "", "tuned"))
        assert f"| half | {chosen}" in EVIDENCE or f"| {chosen} |" in EVIDENCE, measure
    assert ", ".join(f"{value:g}" for value in values_of(rows, "best rho", "", "tuned")) in README


def test_the_lines_predictions_follow_from_the_summary(rows):
    """Half flipped, the declared line: gain = 0.93 + 0.855 times SGD's training accuracy minus SAM's."""
    sweeps = {
        "": "MNIST, MLP 3:1, 50% flipped, 60 epochs, 10,000 images, 5,000 held out",
        "all images, ": "MNIST, MLP 3:1, 50% flipped, 60 epochs, 5,000 held out",
    }
    found = {}
    for row in rows:
        if row["sweep"] in sweeps.values() and row["rule"] == "last":
            found[row["sweep"], row["measure"], row["width"], row["rho"]] = float(row["mean"])
    table = re.findall(r"^\| (\d+-\d+), (all images, )?rho ([\d.]+)[^|]* \|" + 4 * r" (.+?) \|", EVIDENCE, re.MULTILINE)
    assert len(table) > 5
    for width, images, rho, *printed in table:
        sweep = sweeps[images]
        fits = found[sweep, "training accuracy of SGD", width, ""]
        fits -= found[sweep, "training accuracy of SAM", width, rho]
        predicted = 0.93 + 0.855 * fits
        gain = found[sweep, "gain", width, rho]
        assert printed == [f"{value:+.1f}" for value in (fits, predicted, gain, gain - predicted)], width


def test_every_figure_has_its_place_and_every_link_a_target():
    for page, folder in ((README, ROOT), (EVIDENCE, ROOT / "results")):
        for link in re.findall(r"\]\(([^)#]+)[)#]", page):
            if not link.startswith("http"):
                assert (folder / link).exists(), link
    shown = README + EVIDENCE
    for path in SHIPPED.glob("*.png"):
        assert path.name in shown, path.name
    chapters = {
        re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", EVIDENCE, re.M)
    }
    assert set(re.findall(r"results/README\.md#([a-z-]+)", README)) <= chapters
