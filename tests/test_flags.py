"""Bad input: one line on stderr that names the flag or the file, exit status 2, no traceback."""

import re
import runpy
import shutil
import sys

import pytest
import torch
from helpers import ROOT, files, run, runs
from PIL import Image

import label_noise
import mlp_width
import resnet_width
import sparsity

MINI = "--data-dir data/mini --dataset mnist"
CASES = [  # (command line, what the line must name)
    ("mlp_width.py --epochs 0", "--epochs"),
    ("mlp_width.py --epochs many", "--epochs"),
    ("mlp_width.py --epochs 2.5", "--epochs"),
    ("mlp_width.py --batch-size 0", "--batch-size"),
    ("mlp_width.py --lr 0", "--lr"),
    ("mlp_width.py --lr nan", "--lr"),
    ("mlp_width.py --lr inf", "--lr"),
    ("mlp_width.py --momentum 1", "--momentum"),
    ("mlp_width.py --momentum -0.1", "--momentum"),
    ("mlp_width.py --weight-decay -1", "--weight-decay"),
    ("mlp_width.py --seed -1", "--seed"),
    ("mlp_width.py --seed 99999999999999999999", "--seed"),
    ("mlp_width.py --seed", "--seed"),
    ("mlp_width.py --train-size 0", "--train-size"),
    ("mlp_width.py --val-size -1", "--val-size"),
    ("mlp_width.py --sam --rho -0.1", "--rho"),
    ("mlp_width.py --sam --rho nan", "--rho"),
    ("mlp_width.py --sam --rho inf", "--rho"),
    ("mlp_width.py --rho 0.1", "--sam"),
    ("mlp_width.py --adaptive", "--sam"),
    ("label_noise.py --hidden 9 --sam --perturb first", "--perturb"),
    ("label_noise.py --hidden 9 --perturb last", "--sam"),
    ("mlp_width.py --sam --perturb last", "--perturb"),  # label_noise.py's alone
    ("mlp_width.py --schedule linear", "--schedule"),
    ("mlp_width.py --warmup -1", "--warmup"),
    ("mlp_width.py --loss l1", "--loss"),
    ("mlp_width.py --sharpness -1", "--sharpness"),
    ("mlp_width.py --hidden 0", "--hidden"),
    ("mlp_width.py --hidden 300-", "--hidden"),
    ("mlp_width.py --hidden 300-0", "--hidden"),
    ("mlp_width.py --hidden 300-0100", "--hidden"),
    ("mlp_width.py --hidden 300x100", "--hidden"),
    ("mlp_width.py --filters 4", "--filters"),
    ("mlp_width.py --hidden 1-99999999999999999999999", "--hidden"),
    ("resnet_width.py --filters 99999999999999999999999", "--filters"),
    ("mlp_width.py --device meta", "--device meta"),
    ("mlp_width.py --device mtia", "--device mtia"),
    ("mlp_width.py --dataset teacher --loss ce", "--loss ce"),
    ("mlp_width.py --dataset teacher --val-size 20400", "--val-size"),
    ("mlp_width.py --dataset curve --hidden 9 --val-size 1", "--val-size"),
    ("mlp_width.py --dataset curve-scaled --hidden 9 --val-size 1", "--val-size"),
    ("mlp_width.py --dataset curve --hidden 9-7", "--hidden 9-7"),
    ("mlp_width.py --dataset curve-scaled --hidden 9-7-5", "--hidden 9-7-5"),
    ("mlp_width.py --dataset curve --schedule step", "--schedule step"),
    (f"resnet_width.py {MINI} --depth 50 --filters 2 --train-size 17 --batch-size 16", "--depth 50"),
    ("plot.py --figure x", "--figure"),
    ("mlp_width.py --results " + "long" * 100, "--results"),
    ("resnet_width.py --filters 0", "--filters"),
    ("resnet_width.py --filters four", "--filters"),
    ("resnet_width.py --hidden 75-25", "--hidden"),
    ("resnet_width.py --unknown 1", "--unknown"),
    ("resnet_width.py --ep 3", "--ep"),
    ("resnet_width.py surplus", "surplus"),
    ("resnet_width.py --sam=yes", "--sam"),
    ("label_noise.py", "--hidden"),
    ("label_noise.py --hidden 75-25 --filters 4", "--filters"),
    ("label_noise.py --hidden 75-25 --noise 1.1", "--noise: 1.1 must be at least 0 and at most 1 "),
    ("mlp_width.py --epochs 1.5", "--epochs: invalid int value"),
    ("mlp_width.py --dataset README.md", "--dataset README.md: is not one of mnist"),
    ("label_noise.py --hidden 75-25 --noise -0.1", "--noise"),
    ("sparsity.py --noise 0.5 --filters 4", "--noise"),
    ("sparsity.py --filters 4 --sparsity 1", "--sparsity"),
    ("sparsity.py --filters 4 --sparsity -0.5", "--sparsity"),
    ("sparsity.py --filters 4 --pruner grasp", "--pruner"),
    ("mlp_width.py --device tpu9", "--device tpu9"),
    ("mlp_width.py --device cuda:99", "--device cuda:99"),
    ("mlp_width.py --dataset imagenet", "--dataset imagenet"),
    ("mlp_width.py --dataset {tmp}/none", "--dataset"),
    (f"mlp_width.py {MINI} --train-size 4001", "--train-size"),
    (f"mlp_width.py {MINI} --val-size 4000", "--val-size"),
    (f"mlp_width.py {MINI} --train-size 100 --sharpness 101", "--sharpness 101"),
    (f"mlp_width.py {MINI} --val-size 3000 --train-size 1001", "--train-size"),
    (f"mlp_width.py {MINI} --results README.md", "--results"),
    (f"mlp_width.py {MINI} --results README.md/inside", "--results"),
    (f"mlp_width.py {MINI} --results /dev/null", "--results"),
    (f"mlp_width.py {MINI} --hidden 99999999-99999999", "--batch-size"),
    ("mlp_width.py --dataset mnist --data-dir {tmp}/torn", "{tmp}/torn"),
    ("mlp_width.py --dataset cifar10 --data-dir {tmp}/empty", "{tmp}/empty"),
    ("mlp_width.py --dataset mnist --data-dir README.md", "README.md"),
    ("resnet_width.py --filters 2 --dataset {tmp}/no_test", "no_test"),
    ("resnet_width.py --filters 2 --dataset {tmp}/no_classes", "no_classes"),
    ("resnet_width.py --filters 2 --dataset {tmp}/broken", "broken.png"),
    ("resnet_width.py --filters 2 --dataset {tmp}/sizes", "big.png"),
    ("resnet_width.py --filters 2 --dataset {tmp}/classes", "classes"),
    ("label_noise.py --filters 2 --dataset {tmp}/one_class", "one_class"),
    ("plot.py --results {tmp}/empty --figures {tmp}/figures", "--results"),
    ("plot.py --colour red", "--colour"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data that are damaged in the ways that the cases name."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "empty").mkdir()
    raw = shutil.copytree(ROOT / "data" / "mini", folder / "torn") / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:100_000])
    for name in ("no_test", "broken", "sizes", "classes", "one_class"):
        for part in ("train", "test"):
            for label in "ab":
                place = folder / name / part / label
                place.mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(place / "image.png")
    shutil.rmtree(folder / "no_test" / "test")
    for part in ("train", "test"):
        shutil.rmtree(folder / "one_class" / part / "b")
    (folder / "no_classes" / "train").mkdir(parents=True)
    (folder / "no_classes" / "test").mkdir()
    (folder / "broken" / "train" / "a" / "broken.png").write_bytes(b"not an image")
    Image.new("RGB", (64, 64)).save(folder / "sizes" / "test" / "a" / "big.png")
    shutil.move(folder / "classes" / "test" / "b", folder / "classes" / "test" / "c")
    return folder


def lines_of(captured):
    return [line for line in captured.splitlines() if line.strip()]


@pytest.mark.parametrize(("command", "named"), CASES, ids=[command for command, _ in CASES])
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capfd, command, named):
    script, *argv = command.format(tmp=folder).split()
    if "--results" not in argv and script != "plot.py":
        argv += ["--results", str(tmp_path)]
    if "cuda" not in command and script != "plot.py" and "--device" not in argv:
        argv += ["--device", "cpu"]
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # so that a download fails, network or not
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(script, run_name="__main__")
    captured = capfd.readouterr()
    assert exit.value.code == 2
    assert len(lines_of(captured.err)) == 1 and named.format(tmp=folder) in captured.err, captured.err
    assert len(captured.err) < 300 + len(command) + 2 * len(str(folder))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("label_noise.py --hidden 75-25 --dataset imagenet", "--dataset imagenet"),
        ("label_noise.py --hidden 75-25 --dataset teacher", "--dataset teacher"),  # mlp_width.py's alone
    ],
)
def test_a_process_of_its_own_says_the_same(tmp_path, command, named):
    assert named in run(f"{command} --device cpu", tmp_path, status=2, lines=1)
    assert files(tmp_path) == []


def test_what_python_says_of_a_device_is_cut_short(monkeypatch, tmp_path, capsys):
    def fail(*size, device):
        raise RuntimeError("no such backend; those built in are " + "this, " * 1000 + "\nand more lines")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(SystemExit) as exit:
        runs(mlp_width, tmp_path, "--device", "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "--device cpu" in line and "no such backend" in line and len(line) < 200


def test_folders_whose_names_are_not_utf8_have_names_of_their_own():
    one, other = (runs(resnet_width, "results", "--dataset", f"birds{c}")[0].name for c in "\udcff\udcfe")
    assert "birds%FF" in one and "birds%FE" in other


def test_help_names_every_flag_and_some_defaults(tmp_path, capsys):
    common_flags = "sam rho adaptive epochs batch-size lr momentum weight-decay schedule warmup loss sharpness"
    common_flags += " seed dataset data-dir train-size val-size device amp compile fp32 results force save"
    own = {mlp_width: "hidden", resnet_width: "filters", label_noise: "hidden filters noise perturb"}
    own[sparsity] = "hidden filters sparsity pruner"
    for script, more in own.items():
        with pytest.raises(SystemExit) as exit:
            runs(script, tmp_path, "--help")
        text = capsys.readouterr().out
        assert exit.value.code == 0 and script.__doc__.splitlines()[0] in text
        for flag in [*common_flags.split(), *more.split()]:
            assert re.search(rf"^  --{flag}\b", text, re.MULTILINE), flag


def test_help_gives_the_defaults_of_every_workload(tmp_path, capsys):
    """(default: what most have; this workload's, that one's): written by hand, so compared with the settings."""
    with pytest.raises(SystemExit):
        runs(mlp_width, tmp_path, "--help")
    text = " ".join(capsys.readouterr().out.split())
    workloads = {"MNIST": mlp_width.MNIST, "teacher": mlp_width.TEACHER, "curves": mlp_width.CURVE}
    workloads |= {"CIFAR-10": resnet_width.CIFAR10, "ImageNet": resnet_width.IMAGENET}
    for flag in ("epochs", "batch-size", "lr", "momentum", "weight-decay", "schedule", "warmup", "loss"):
        told = re.search(rf" --{flag} .*?\(default: (.*?)\)", text)[1]
        most, _, others = told.partition("; ")
        defaults = dict.fromkeys(workloads, most)
        for part in others.split(", ") if others else []:
            *names, value = part.replace(" and ", " ").split()
            assert workloads.keys() >= {*names}
            defaults.update(dict.fromkeys(names, value))
        for name, settings in workloads.items():
            value = settings[flag.replace("-", "_")]
            assert type(value)(defaults[name]) == value, (flag, name)
