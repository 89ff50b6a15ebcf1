"""ResNet-50, and a folder of images of any size and mode that are read while it trains."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    Script,
    call_main,
    files,
    result_of,
    run,
    runs,
    start_pair,
    strict,
    timeless,
    train,
)
from PIL import Image

import common
import resnet_width
from resnet_width import ResNet50

SIZE, TRAIN, TEST = 32, 45, 14
MODES = {"L": "png", "RGB": "jpg", "RGBA": "png", "CMYK": "jpg", "P": "png", "LA": "png"}
FLAGS = ["--image-size", SIZE, "--filters", 4, "--batch-size", 16, "--epochs", 4, "--lr", 0.05, "--val-size", 5]
DEEP = [*FLAGS, "--depth", 50, "--warmup", 2]


def in_mode(grey, mode):
    """An image of this mode that looks like the (H, W) uint8 array."""
    return Image.fromarray(grey).convert("RGB" if mode == "CMYK" else mode).convert(mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark and bright noise, in all modes and in sizes from 20 to 99."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", TEST)):
        for i in range(count):
            mode = [*MODES][i // 2 % len(MODES)]
            grey = rng.integers(0, 100, rng.integers(20, 100, 2)) + 140 * (i % 2)
            place = root / part / ("dark", "bright")[i % 2] / f"{i}.{MODES[mode]}"
            place.parent.mkdir(parents=True, exist_ok=True)
            in_mode(grey.astype(np.uint8), mode).save(place)
    return root


def data_of(folder, results, *argv):
    (config,) = runs(resnet_width, results, "--dataset", folder, *FLAGS, "--workers", 0, *argv)
    return resnet_width.load_images(config), config


@pytest.mark.parametrize(
    "filters, count", [(16, 1_993_976), (32, 6_917_640), (48, 14_771_992), (64, 25_557_032), (80, 39_272_760)]
)
def test_resnet50_has_the_papers_parameters(filters, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet50(filters).parameters()) == count


@pytest.mark.parametrize("make", [ResNet50, common.ResNet18], ids=["50", "18"])
def test_a_resnet_computes_what_torchvisions_does(float64, make):
    from torchvision import models

    torch.manual_seed(0)
    theirs, ours = getattr(models, make.__name__.lower())(num_classes=10), make(classes=10)
    if make is common.ResNet18:  # for small images
        theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():  # biases, and all that BatchNorm has
                tensor.uniform_(0.5, 1.5)
    source, target = theirs.state_dict(), ours.state_dict()
    ours.load_state_dict(dict(zip(target, source.values(), strict=True)))
    x = torch.randn(2, 3, 33, 32)
    for training in (False, True):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-12, atol=0)
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values()):  # BatchNorm has moved them
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_resnet50_starts_as_the_other_models_with_each_blocks_last_scale_at_0():
    torch.manual_seed(0)
    model = ResNet50(16, 1, 7)
    scales = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sum(bool((scale == 0).all()) for scale in scales) == 16
    assert all((scale == 0).all() or (scale == 1).all() for scale in scales)
    for m in model.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
            scaled = m.weight * m.weight[0].numel() ** 0.5
            assert scaled.abs().max() < 2.275 and (scaled.numel() < 4000 or 0.95 < scaled.std() < 1.05)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_depth_50_has_the_papers_settings(tmp_path):
    (deep,) = runs(resnet_width, tmp_path, "--depth", 50, "--image-size", 224, "--dataset", "x", "--workers", 7)
    (shallow,) = runs(resnet_width, tmp_path)
    assert (deep.epochs, deep.batch_size, deep.lr, deep.momentum, deep.weight_decay) == (90, 512, 0.1, 0.9, 1e-4)
    assert (deep.schedule, deep.warmup, deep.loss) == ("cosine", 5000, "ce")
    assert "depth=50_image-size=224" in deep.name and "workers" not in deep.name and "warmup" not in deep.name
    assert (shallow.schedule, shallow.warmup, shallow.weight_decay) == ("step", 0, 5e-4)
    rates = [common.learning_rate(deep, step, 2503) for step in (0, 4999, 5000, 5000 + (90 * 2503 - 5000) // 2)]
    assert rates == pytest.approx([0.1 / 5000, 0.1, 0.1, 0.05], rel=1e-4)


def test_an_image_looks_the_same_in_every_mode(tmp_path):
    grey = np.add.outer(np.arange(60), 2 * np.arange(50)).astype(np.uint8)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
        in_mode(grey, "L").save(tmp_path / part / "a" / "0.png")
        for mode in ("RGB", "RGBA", "CMYK", "P", "LA"):
            in_mode(grey, mode).save(tmp_path / part / "b" / f"{mode}.tif")
    data, _ = data_of(tmp_path, tmp_path, "--val-size", 0)
    (images,) = data.test.select([torch.arange(6)])
    assert images.shape == (6, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert (images - images[:1]).abs().max() < 1.5 / 255 / 0.22


def test_a_test_image_is_the_centre_of_the_image_with_its_short_side_at_8_sevenths(folder, tmp_path):
    data, _ = data_of(folder, tmp_path)
    (images,) = data.test.select([torch.arange(TEST)])
    short = round(SIZE * 8 / 7)
    for path, ours in zip(data.test.inputs, images):
        image = common.open_image(os.fsdecode(path)).convert("RGB")
        scale = short / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - SIZE) / 2) for side in image.size)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE)))).permute(2, 0, 1) / 255
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        torch.testing.assert_close(ours * std + mean, pixels, rtol=0, atol=3.01 / 255)


def test_training_crops_are_those_that_pillow_would_take(tmp_path):
    """torchvision's transforms, given Pillow's image instead of a tensor, from the same random state."""
    decoder = resnet_width.Decoder(SIZE)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (120, 90), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "image.png")
    for index in range(30):
        ours = decoder.read(tmp_path / "image.png", index, (0, 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((0, 1, index)).integers(2**63)))
            theirs = np.array(decoder.augment(smooth))
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
        assert difference.max() <= 3, index


def test_training_crops_have_the_stated_areas_and_shapes_and_half_are_flipped(tmp_path):
    """On an image whose red is the column and whose green is the row, a crop tells where it was taken."""
    ramp = np.stack(np.broadcast_arrays(np.arange(256), np.arange(256)[:, None], 0), 2).astype(np.uint8)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / name / "0.png")
    data, _ = data_of(tmp_path, tmp_path, "--val-size", 0)
    images = torch.cat([x for epoch in range(100) for x in data.train.select([torch.arange(2)], (0, epoch))])
    assert not torch.equal(images[0], images[1])  # one picture, but two indices
    pixels = 255 * (images * 0.2265 + 0.4705)  # red's and green's statistics, nearly
    widths = (pixels[:, 0, 16, -3] - pixels[:, 0, 16, 2]) / 27
    heights = (pixels[:, 1, -3, 16] - pixels[:, 1, 2, 16]) / 27
    widths, heights, flipped = SIZE * widths.abs(), SIZE * heights, widths < 0
    areas, shapes = widths * heights / 256**2, widths / heights
    assert 0.07 < areas.min() < 0.15 and 0.85 < areas.max() < 1.05 and 0.45 < areas.mean() < 0.6
    assert 0.7 < shapes.min() < 0.8 and 1.25 < shapes.max() < 1.45
    assert 0.4 < flipped.float().mean() < 0.6


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder, tmp_path):
    data, _ = data_of(folder, tmp_path)
    state = torch.initial_seed()
    (whole,) = data.train.select([torch.arange(10)], (0, 1))
    parts = torch.cat([*data.train.select([torch.tensor([9, 2]), torch.tensor([5])], (0, 1))])
    assert torch.equal(parts, whole[[9, 2, 5]])
    for seed in ((0, 2), (1, 1)):
        (other,) = data.train.select([torch.arange(10)], seed)
        assert not any(map(torch.equal, whole, other))
    plain, again = (next(data.train.select([torch.arange(10)])) for _ in range(2))
    assert torch.equal(plain, again) and not torch.equal(plain, whole)
    assert torch.initial_seed() == state  # this process's own generator is as it was


def test_each_process_reads_its_own_share(folder, tmp_path, monkeypatch):
    data, config = data_of(folder, tmp_path)
    whole, opened = [*common.batches(data, config, 3)], []
    monkeypatch.setattr(resnet_width, "open_image", lambda path: opened.append(path) or common.open_image(path))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "processes", lambda rank=rank: (rank, 2))
        shares.append([*common.batches(data, config, 3)])
    assert sorted(opened) == sorted(map(os.fsdecode, data.train.inputs))
    for (x, y), *parts in zip(whole, *shares):
        for rank, (images, labels) in enumerate(parts):
            assert torch.equal(images, x[rank::2]) and torch.equal(labels, y[rank::2])
            assert images.is_contiguous()  # NHWC strides under a contiguous model corrupt torch's memory on some CPUs


def test_held_out_images_are_the_last_of_the_shuffled_order(folder, tmp_path):
    data, _ = data_of(folder, tmp_path, "--train-size", 30)
    everything, _ = data_of(folder, tmp_path, "--val-size", 0)
    paths = everything.train.inputs.tolist()
    assert data.train.inputs.tolist() == paths[:30] and data.val.inputs.tolist() == paths[-5:]
    assert 0 < data.val.targets.sum() < 5 and (len(data.test.targets), data.outputs) == (TEST, 2)


def test_sharpness_is_that_of_the_first_training_images_without_augmentation(folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(common, "sharpness", lambda model, loss, images, *more: given.append(images) or {"images": 3})
    data, config = data_of(folder, tmp_path, "--sharpness", 3, "--epochs", 1)
    assert train(resnet_width, config)["sharpness"] == {"images": 3}
    assert torch.equal(given[0], *data.train.select([torch.arange(3)]))


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """A deep run's result, without workers, in this process."""
    results = tmp_path_factory.mktemp("undisturbed")
    (config,) = runs(resnet_width, results, "--dataset", folder, *DEEP, "--workers", 0, "--sam")
    return train(resnet_width, config)


def test_it_learns_and_records_what_the_others_do(folder, undisturbed, tmp_path):
    (config,) = runs(resnet_width, tmp_path, "--dataset", folder, *FLAGS, "--epochs", 6, "--workers", 0)
    for result in (undisturbed, train(resnet_width, config)):
        last = result["history"][-1]
        assert last["train_acc"] > 0.85 and last["train_loss"] < result["history"][0]["train_loss"]
        assert {"val_loss", "val_acc", "test_loss", "test_acc", "lr", "seconds"} < last.keys()


def die_after_an_epoch():
    end_epoch = common.Recorder.end_epoch

    def end(recorder, row):
        end_epoch(recorder, row)
        recorder.save()
        os.kill(os.getpid(), signal.SIGKILL)

    common.Recorder.end_epoch = end


def test_the_history_is_the_same_for_any_number_of_workers_and_after_a_kill(folder, undisturbed, tmp_path):
    command = ["resnet_width.py", "--device", "cpu", "--dataset", folder, *DEEP, "--sam"]
    one = Script([*command, "--workers", 1], tmp_path / "one")
    Script([*command, "--workers", 0], tmp_path / "two", die_after_an_epoch).end(-signal.SIGKILL)
    assert [path.suffix for path in files(tmp_path / "two")] == [".ckpt"]
    run([*command, "--workers", 2], tmp_path / "two")
    one.end()
    for name in ("one", "two"):
        assert timeless(result_of(tmp_path / name)) == timeless(undisturbed)


def test_two_processes_train_together_and_score_all_images(folder, tmp_path):
    command = ["resnet_width.py", "--device", "cpu", "--dataset", folder, *DEEP, "--sam", "--workers", "1"]
    for script in start_pair(command, tmp_path):
        script.end()
    result = result_of(tmp_path)
    assert result["config"]["processes"] == 2 and len(result["history"]) == 4
    for row in result["history"]:
        for key, count in (("train_acc", TRAIN - 5), ("val_acc", 5), ("test_acc", TEST)):
            assert row[key] * count == pytest.approx(round(row[key] * count), abs=1e-5)
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_one_line_with_its_path(folder, tmp_path, workers):
    broken = tmp_path / "images" / "train" / "dark"
    broken.mkdir(parents=True)
    for link in ("train/bright", "val"):
        os.symlink(folder / link, tmp_path / "images" / link)
    for i in range(30):  # several: each worker meets one
        (broken / f"{i}.jpg").write_bytes(files(folder / "train")[0].read_bytes()[:200])
    command = ["resnet_width.py", "--device", "cpu", "--dataset", tmp_path / "images", *FLAGS, "--workers", workers]
    if workers:  # as a user starts it, since such a process ends its workers in another way
        argv = [sys.executable, *map(str, command), "--results", str(tmp_path / "results")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        errors = done.stderr
        assert done.returncode == 2 and len(errors.splitlines()) == 1, errors
    else:
        errors = run(command, tmp_path / "results", status=2, lines=1)
    assert str(broken) in errors and ".jpg: is not an image that can be read" in errors


def test_a_deep_image_is_refused_where_it_is_decoded(tmp_path, capsys):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / place).mkdir(parents=True)
        Image.fromarray(np.full((40, 40), 200, np.uint16)).save(tmp_path / "images" / place / "1.png")
    argv = ["--dataset", tmp_path / "images", "--image-size", SIZE, "--filters", 1, "--workers", 0]
    with pytest.raises(SystemExit, match="2"):
        call_main(resnet_width, tmp_path / "results", *argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert "1.png" in line and "convert it to 8 bits" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_workers_too_says_one_line(folder, tmp_path, number):
    """As Ctrl-C does, and a scheduler that ends a job: the whole process group gets it."""
    command = ["resnet_width.py", "--device", "cpu", "--dataset", folder, *FLAGS, "--workers", 2, "--epochs", 10_000]
    script = Script(command, tmp_path, os.setsid)
    while not list(tmp_path.rglob("*.ckpt")):
        assert script.process.is_alive()
        time.sleep(0.05)
    os.killpg(script.process.pid, number)
    assert "stopped; the same command goes on" in script.end(status=128 + number, lines=1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--image-size", 64], "--image-size 64: needs --dataset FOLDER, not mnist"),
        (["--image-size", 64, "--dataset", "none"], "--dataset none: is not one of mnist"),
        (["--image-size", 8], "--image-size"),
        (["--workers", -1], "--workers"),
        (["--depth", 34], "--depth"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        call_main(resnet_width, tmp_path, *argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_depth_50_runs_on_small_images_too(tmp_path):
    call_main(resnet_width, tmp_path, "--depth", 50, "--filters", 1, "--train-size", 30, "--epochs", 1)
    assert strict(files(tmp_path)[0])["status"] == "done"
