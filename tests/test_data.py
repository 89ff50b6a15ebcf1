"""The data: batches, augmentation, what is held out, the regressions, torchvision's data sets, folders of images."""

import argparse
import math
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from helpers import ROOT, Script, result_of, runs, train
from PIL import Image

import common
import mlp_width
import resnet_width
from common import MLP, crop_and_flip, load_data, normalize


def test_crops_and_flips_equal_pixel_by_pixel_copies():
    images = torch.randint(1, 256, (40, 3, 32, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moves = torch.from_numpy(np.random.default_rng(0).integers(0, (9, 9, 2), (40, 3)))
    out = crop_and_flip(images, moves)
    assert out.is_contiguous() and out.dtype == torch.uint8
    for image, (top, left, flip), result in zip(images.numpy(), moves.tolist(), out.numpy()):
        padded = np.zeros((3, 40, 38), dtype=np.uint8)
        padded[:, 4:36, 4:34] = image
        crop = padded[:, top : top + 32, left : left + 30]
        assert np.array_equal(result, crop[:, :, ::-1] if flip else crop)


def test_normalization_is_the_papers():
    images = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    expected = (128 / 255 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor([0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(normalize(images)[0, :, 0, 0], expected)
    assert torch.equal(normalize(images[:, :1]), images[:, :1].float() / 255)
    assert torch.equal(normalize(torch.full((2, 5), 128.0)), torch.full((2, 5), 128.0))  # numbers stay as they are


def epoch_of(fake_data, seed, epoch, augment=True):
    config, data = argparse.Namespace(seed=seed, batch_size=16, device="cpu"), fake_data(50, augment=augment)
    return list(common.batches(data, config, epoch, data.train.targets, torch.arange(50)))


def test_an_epoch_has_every_image_once_and_its_last_small_batch(fake_data):
    found = epoch_of(fake_data, 0, 1, augment=False)
    assert [len(index) for *_, index in found] == [16, 16, 16, 2]
    index = torch.cat([index for *_, index in found])
    assert sorted(index.tolist()) == list(range(50)) != index.tolist()
    assert torch.equal(torch.cat([y for _, y, _ in found]), index % 10)
    assert torch.equal(torch.cat([x for x, *_ in found]), normalize(fake_data(50).train.inputs)[index])


def test_order_and_augmentation_are_functions_of_seed_and_epoch(fake_data):
    def same(a, b, part):
        return all(torch.equal(one[part], other[part]) for one, other in zip(a, b))

    first = epoch_of(fake_data, 3, 2)
    torch.manual_seed(7)
    assert same(first, epoch_of(fake_data, 3, 2), 0) and same(first, epoch_of(fake_data, 3, 2), 2)
    assert not same(first, epoch_of(fake_data, 3, 2, augment=False), 0)
    for other in ((3, 3), (4, 2), (2, 3)):
        assert not same(first, epoch_of(fake_data, *other), 0) and not same(first, epoch_of(fake_data, *other), 2)


def mini():
    return common.read_torchvision("mnist", str(ROOT / "data" / "mini"))


def test_held_out_images_are_the_last_and_never_trained_on(tmp_path):
    (config,) = runs(mlp_width, tmp_path, "--train-size", 300, "--val-size", 100)
    data, ((images, labels), test) = load_data(config), mini()
    assert torch.equal(data.val.inputs, images[-100:]) and torch.equal(data.val.targets, labels[-100:])
    assert torch.equal(data.train.inputs, images[:300]) and torch.equal(data.train.targets, labels[:300])
    assert torch.equal(data.test.inputs, test[0]) and torch.equal(data.test.targets, test[1])
    assert data.shape == (1, 28, 28) and data.outputs == 10 and not data.augment
    (config,) = runs(mlp_width, tmp_path, "--val-size", 100)
    assert torch.equal(load_data(config).train.inputs, images[:-100])  # all that is left
    (config,) = runs(mlp_width, tmp_path)
    assert len(load_data(config).train.targets) == 4000 and len(load_data(config).val.targets) == 0


@pytest.mark.parametrize(
    ("size", "train_size", "val_size", "processes", "fits"),
    [(10, 256, 0, 2, True), (1, 256, 0, 2, False), (5, 256, 0, 2, False), (255, 256, 0, 2, False)]
    + [(1, 256, 0, 1, True), (128, 4000, 0, 1, True), (128, 4001, 0, 1, False), (128, 3900, 100, 1, True)]
    + [(128, 3901, 100, 1, False), (128, None, 3999, 1, True), (128, None, 4000, 1, False), (128, 255, 0, 3, True)]
    + [(128, 256, 2, 2, True), (128, 256, 1, 2, False), (128, 256, 1, 1, True)],
)
def test_every_process_has_an_image_of_every_batch(tmp_path, capsys, size, train_size, val_size, processes, fits):
    (config,) = runs(mlp_width, tmp_path, "--batch-size", size, "--val-size", val_size)
    config.train_size, config.processes = train_size, processes
    if fits:
        assert common.split_sizes(config, 4000, 1000) == (train_size or 4000 - val_size, 4000 - val_size)
    else:
        with pytest.raises(SystemExit) as exit:
            common.split_sizes(config, 4000, 1000)
        assert exit.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_every_process_has_a_test_image(tmp_path, capsys):
    (config,) = runs(mlp_width, tmp_path)
    config.processes = 3
    assert common.split_sizes(config, 4000, 3) == (4000, 4000)
    with pytest.raises(SystemExit) as exit:  # of 2, one process would have none: its scores would not be numbers
        common.split_sizes(config, 4000, 2)
    assert exit.value.code == 2 and "2 test images" in capsys.readouterr().err


def test_small_images_are_centred_in_zeros_for_a_resnet(tmp_path):
    (config,) = runs(resnet_width, tmp_path, "--filters", 2, "--train-size", 300)
    images = load_data(config).train.inputs
    assert images.shape == (300, 1, 32, 32)
    assert torch.equal(images[:, :, 2:30, 2:30], mini()[0][0][:300])
    assert images.sum() == images[:, :, 2:30, 2:30].sum()


# ------------------------------------------------------------ torchvision


def fake_torchvision(name):
    """torchvision's class, as much of it as is used: what CIFAR10, MNIST and SVHN hold is laid out in three ways."""

    def make(root, download, train=None, split=None):
        assert download and (split in ("train", "test") if name == "SVHN" else train in (True, False))
        n = 5 if train or split == "train" else 3
        pixels = np.arange(n * 6 * 4 * 3, dtype=np.uint8).reshape(n, 6, 4, 3)  # (N, H, W, C)
        labels = [i % 3 for i in range(n)]
        if name == "SVHN":
            return argparse.Namespace(data=pixels.transpose(0, 3, 1, 2), labels=np.array(labels))
        if name == "KMNIST":
            return argparse.Namespace(data=torch.tensor(pixels[..., 0]), targets=torch.tensor(labels))
        return argparse.Namespace(data=pixels, targets=labels)

    return make


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "KMNIST", "SVHN"])
def test_torchvisions_data_sets_become_images_and_labels(monkeypatch, tmp_path, name):
    monkeypatch.setattr(f"torchvision.datasets.{name}", fake_torchvision(name))
    (config,) = runs(mlp_width, tmp_path, "--dataset", name, "--data-dir", "nowhere")
    data = load_data(config)
    channels = 1 if name == "KMNIST" else 3
    assert config.dataset == name.lower() and data.shape == (channels, 6, 4) and data.outputs == 3
    assert data.augment == name.startswith("CIFAR")
    for split, n in ((data.train, 5), (data.test, 3)):
        pixels = torch.arange(n * 72).to(torch.uint8).view(n, 6, 4, 3).permute(0, 3, 1, 2)
        assert torch.equal(split.inputs, pixels[:, :channels]) and split.targets.tolist() == [i % 3 for i in range(n)]
    common.read_torchvision.cache_clear()


# ------------------------------------------------------------ regressions


def test_the_teachers_data_are_the_papers_and_the_same_for_every_run(monkeypatch):
    networks = []
    monkeypatch.setattr(mlp_width, "MLP", lambda *a, **more: networks.append(MLP(*a, **more)) or networks[0])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (x, y), (test_x, test_y) = mlp_width.teacher(None)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.shape == (20_400, 100) and y.shape == (20_400, 1) and test_x.shape == (5_100, 100)
    everything = torch.cat([x, test_x])
    assert everything.unique(dim=0).shape == (25_500, 100)
    n = everything.numel()
    assert abs(everything.mean()) < 4 / n**0.5 and abs(everything.var() - 1) < 4 * (2 / n) ** 0.5
    assert [p.shape for p in networks[0].parameters()] == [(200, 100), (200,), (1, 200), (1,)]
    with torch.no_grad():
        noise = torch.cat([y, test_y]) - networks[0](everything)
    assert abs(noise.mean()) < 4 / 25_500**0.5 and abs(noise.var() - 1) < 4 * (2 / 25_500) ** 0.5
    torch.manual_seed(2)
    networks.clear()
    again = mlp_width.teacher(None)
    assert torch.equal(again[0][0], x) and torch.equal(again[0][1], y) and torch.equal(again[1][1], test_y)


@pytest.mark.parametrize("name", ["curve", "curve-scaled"])
def test_the_curve_has_the_papers_points_and_a_thousand_steps_an_epoch(tmp_path, name):
    (config,) = runs(mlp_width, tmp_path, "--dataset", name, "--hidden", 10)
    data = load_data(config)
    xs = [-5.5, -4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    points = [[x / 4 + 0.07, 0.345 + y] for x, y in zip(xs, [-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])]
    torch.testing.assert_close(torch.cat([data.test.inputs, data.test.targets], 1), torch.tensor(points))
    train_points = torch.cat([data.train.inputs, data.train.targets], 1)
    found, counts = train_points.unique(dim=0, return_counts=True)
    torch.testing.assert_close(found, torch.tensor(points))
    assert counts.tolist() == [500] * 12
    assert math.ceil(len(data.train.targets) / config.batch_size) == 1000
    assert data.shape == (1,) and data.outputs == 1 and not data.augment


@pytest.mark.parametrize(("name", "std"), [("curve", 4), ("curve-scaled", 4 / math.sqrt(4000))])
def test_the_curves_network_starts_as_the_paper_says(tmp_path, name, std):
    (config,) = runs(mlp_width, tmp_path, "--dataset", name, "--hidden", 4000)
    model = common.build_model(config, load_data(config))
    mlp_width.initialize_for_curve(model, config)
    inner, outer = model[1], model[-1]
    assert set(inner.weight.flatten().tolist()) == {-2.5, 2.5} and outer.bias is None
    assert 1800 < (inner.weight > 0).sum() < 2200
    for w, expected in ((inner.bias, 2.5), (outer.weight, std)):
        assert abs(w.mean()) < 4 * expected / 4000**0.5
        assert abs(w.std() / expected - 1) < 4 / 8000**0.5


def test_a_curves_result_has_its_function_before_and_after(monkeypatch, tmp_path):
    models, before = [], []

    def initialize(model, config):
        original(model, config)
        models.append(model)
        before.append([p.detach().clone() for p in model.parameters()])

    original = mlp_width.initialize_for_curve
    monkeypatch.setattr(mlp_width, "initialize_for_curve", initialize)
    (config,) = runs(mlp_width, tmp_path, *"--dataset curve --hidden 6 --train-size 120 --epochs 3".split())
    function = train(mlp_width, config)["function"]
    assert function["x"] == [round(-1.5 + i / 100, 2) for i in range(311)]
    for key, weights in (("y_initial", before[0]), ("y", list(models[0].parameters()))):
        w_in, b, w_out = (w.flatten().tolist() for w in weights)
        by_hand = [sum(o * max(w * x + c, 0) for w, c, o in zip(w_in, b, w_out)) for x in function["x"]]
        assert np.allclose(function[key], by_hand, atol=1e-4)
    assert function["y"] != function["y_initial"]


# ------------------------------------------------------------ data of one's own

OWN = """
import torch
from common import DATASETS, MLP, prepare

def own(config):
    x = torch.linspace(0, 1, 40).view(-1, 1).repeat(1, 3)
    return (x, torch.cat([x.sum(1, keepdim=True), x[:, :1]], 1)), (x[:7], torch.zeros(7, 2))

DATASETS["own"] = own
OWN = {**TEACHER, "epochs": 2, "batch_size": 16}

def build_model(config, data):
    torch.manual_seed(config.seed)
    return prepare(MLP((config.units,), data.shape[0], data.outputs), config)

if __name__ == "__main__":
    parser = flags("mine")
    parser.add_argument("--units", type=int, nargs="+", default=[5], help="mine")
    main(parser, train, lambda args: OWN)
"""


def test_a_copied_script_with_data_and_flags_of_its_own_is_named_and_skipped(tmp_path):
    text = (ROOT / "mlp_width.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(text[: text.index("if __name__")] + OWN, encoding="utf-8")
    command = f"{tmp_path}/mine.py --dataset own --device cpu"
    Script(command, tmp_path / "results").end()
    result = result_of(tmp_path / "results")
    assert result["num_params"] == 3 * 5 + 5 + 5 * 2 + 2 and result["config"]["script"] == "mine"
    assert len(result["history"]) == 2 and result["config"]["lr"] == 0.01 and "test_acc" not in result["history"][0]
    again = Script(command + " --units 5 7", tmp_path / "results")
    again.end()
    assert "2 runs, 1 already finished" in again.output.read_text()
    names = sorted(path.name for path in (tmp_path / "results" / "mine").iterdir())
    assert len(names) == 2 and sum("units=7" in name for name in names) == 1


def test_images_of_ones_own_are_scaled_but_not_augmented(monkeypatch, tmp_path):
    images = torch.full((6, 3, 8, 8), 128, dtype=torch.uint8)
    own = ((images, torch.arange(6) % 3), (images[:2], torch.arange(2)))
    monkeypatch.setitem(common.DATASETS, "own", lambda config: own)
    (config,) = runs(mlp_width, tmp_path, "--dataset", "OWN", "--hidden", 5)
    data = load_data(config)
    assert not data.augment and data.outputs == 3 and data.shape == (3, 8, 8)
    x, y = next(common.batches(data, config, 1))
    assert torch.equal(x, normalize(images)) and sorted(y.tolist()) == [0, 0, 1, 1, 2, 2]
    assert common.build_model(config, data)(x).shape == (6, 3)


# ------------------------------------------------------------ folders


def save(path, image, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **more)


def rgb(*colours):
    image = Image.new("RGB", (len(colours), 1))
    image.putdata(colours)
    return image


def modes(folder):
    """(path, pixels that are right) of images of every mode that a file may have."""
    colours = [(255, 0, 10), (0, 200, 30), (5, 6, 7)]
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    alpha = Image.new("L", (3, 1), 9)
    yield "L.png", Image.fromarray(grey), grey
    yield "LA.png", Image.merge("LA", (Image.fromarray(grey), alpha)), grey
    yield "1.png", Image.fromarray(grey).point(lambda v: 255 * (v > 50), "1"), [[0, 255, 255]]
    yield "RGB.png", rgb(*colours), [colours]
    yield "RGBA.png", Image.merge("RGBA", (*rgb(*colours).split(), alpha)), [colours]
    yield "P.png", rgb(*colours).quantize(3), [colours]
    yield "CMYK.tif", Image.merge("CMYK", [Image.new("L", (1, 1), v) for v in (255, 0, 0, 0)]), [[(0, 255, 255)]]


def test_images_of_every_mode_are_read_as_8_bits_of_grey_or_colour(tmp_path):
    for name, image, expected in modes(tmp_path):
        save(tmp_path / name, image)
        found = common.open_image(tmp_path / name)
        assert np.array_equal(np.asarray(found), np.asarray(expected)), name
        assert found.mode == ("RGB" if np.ndim(expected) == 3 else "L"), name
    transparent = rgb((1, 2, 3), (4, 5, 6)).quantize(2)
    save(tmp_path / "transparent.png", transparent, transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = common.open_image(tmp_path / "transparent.png")
    assert np.asarray(found).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def broken(folder):
    save(folder / "whole.png", Image.effect_noise((64, 64), 50))
    save(folder / "whole.jpg", Image.effect_noise((64, 64), 50))
    png, jpg = (folder / "whole.png").read_bytes(), (folder / "whole.jpg").read_bytes()
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0))
    files = {
        **{"empty.png": b"", "text.png": b"not an image", "cut.png": png[:2000], "cut.jpg": jpg[:800]},
        **{"header.png": png[:20], "huge.png": png[:8] + huge + png[33:]},
        "chunk.png": png[:33] + b"\x00\x00\x00\x04bad!" + png[41:],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        yield folder / name


def deep(folder):
    """Images of 16 and 32 bits that hold 0 to 255: scaled to 8 bits by a guess, they would be black."""
    values = np.arange(256).reshape(16, 16)
    for name, kind in (("16.png", np.uint16), ("16.tif", np.uint16), ("32.tif", np.int32), ("float.tif", np.float32)):
        save(folder / name, Image.fromarray(values.astype(kind)))
        yield folder / name
    rows = b"".join(b"\0" + struct.pack(">48H", *np.repeat(row, 3)) for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    colours = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "colour16.png").write_bytes(colours)
    yield folder / "colour16.png"


def refusal(path, root, capsys):
    """The one line that a folder with this image among good ones ends with."""
    for part in ("train", "test"):
        for label in "ab":
            save(root / part / label / "1.png", Image.new("L", (64, 64)))
    place = (root / "test" / "b" / "2").with_suffix(path.suffix)
    place.write_bytes(path.read_bytes())
    with pytest.raises(SystemExit) as exit:
        common.read_folder(str(root))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and str(place) in line, line
    return line


def test_files_that_are_no_image_are_named_in_one_line(tmp_path, capsys):
    for path in broken(tmp_path / "files"):
        assert "is not an image that can be read" in refusal(path, tmp_path / path.name, capsys)


def test_images_of_more_than_8_bits_are_refused_with_what_to_do(tmp_path, capsys):
    for path in deep(tmp_path / "files"):
        assert "convert it to 8 bits" in refusal(path, tmp_path / path.name, capsys)


def test_a_folder_of_images_is_a_data_set(tmp_path):
    for part, count in (("train", 40), ("val", 8)):
        for label in range(2):
            for i in range(count):
                colour = (100 * label + i, 255 - i, 7)
                save(tmp_path / "two" / part / str(label) / f"{i}.png", Image.new("RGB", (32, 32), colour))
    argv = ["--dataset", tmp_path / "two", "--filters", 1, "--val-size", 10, "--epochs", 1, "--batch-size", 32]
    (config,) = runs(resnet_width, tmp_path / "results", *argv)
    data = load_data(config)
    assert [len(split.targets) for split in data[:3]] == [70, 10, 16] and data.shape == (3, 32, 32)
    assert data.outputs == 2 and data.augment
    for split in data[:3]:  # images and labels belong together
        assert torch.equal(split.inputs[:, 0, 0, 0] >= 100, split.targets == 1)
        assert 0.2 < split.targets.double().mean() < 0.8  # every class among the first as among the last
    common.read_folder.cache_clear()
    common.scan_folder.cache_clear()
    assert torch.equal(load_data(config).train.inputs, data.train.inputs)  # one order for all runs
    result = train(resnet_width, config)
    assert result["status"] == "done" and result["config"]["dataset"] == str(tmp_path / "two")


def test_a_grey_folder_has_one_channel_and_test_comes_before_val(tmp_path, capsys):
    for part, shade in (("train", 10), ("test", 20), ("val", 30)):
        for label in "ab":
            save(tmp_path / part / label / "1.png", Image.new("L", (32, 32), shade))
    (config,) = runs(mlp_width, tmp_path / "results", "--dataset", tmp_path, "--hidden", 5)
    data = load_data(config)
    assert data.shape == (1, 32, 32) and data.test.inputs.unique().tolist() == [20]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and "test/ is taken" in line


def test_hidden_folders_are_no_classes(tmp_path, capsys):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        save(tmp_path / place / "1.png", Image.new("L", (32, 32)))
    save(tmp_path / "train" / ".ipynb_checkpoints" / "1-checkpoint.png", Image.new("L", (32, 32)))
    (tmp_path / "test" / ".cache").mkdir()
    (config,) = runs(mlp_width, tmp_path / "results", "--dataset", tmp_path, "--hidden", 5)
    data = load_data(config)
    assert data.outputs == 2 and len(data.train.targets) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("part", ["test", "val"])
def test_classes_that_differ_are_named_with_the_folder_that_is_taken(tmp_path, capsys, part):
    for place in ("train/a", "train/b", f"{part}/b", f"{part}/images"):
        save(tmp_path / place / "1.png", Image.new("L", (32, 32)))
    with pytest.raises(SystemExit) as exit:
        common.scan_folder(str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and f"{part}/" in line and line.endswith(" a, images")


def test_spellings_of_a_folder_are_one_run(tmp_path):
    spellings = ["data/mini", "data/mini/", "./data/mini", "data//mini", "data/../data/mini/."]
    for flag in ("--data-dir", "--dataset"):
        found = [runs(mlp_width, tmp_path, flag, spelling)[0] for spelling in spellings]
        assert len({config.name for config in found}) == 1
        assert {getattr(config, flag[2:].replace("-", "_")) for config in found} == {"data/mini"}


def test_a_folder_with_a_data_sets_name_is_that_folder(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    found = {common.dataset_name(spelling) for spelling in ("./mnist", "mnist/", str(tmp_path / "mnist"))}
    (folder,) = found
    assert folder not in common.DATASETS and os.path.samefile(folder, "mnist")
    assert common.dataset_name("mnist") == common.dataset_name("MNIST") == "mnist"
