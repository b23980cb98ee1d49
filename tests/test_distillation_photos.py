"""Photos for distillation: from folders, shards and web servers; unreadable ones have no effect."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_distillation as tiny
import tiny_fit
import tiny_training
from denoising_vit.data import open_dataset
from denoising_vit.data.photos import read_photo
from denoising_vit.distilled.train import Distillation
from denoising_vit.errors import TrainError
from denoising_vit.training import photos as photos_module
from denoising_vit.training.photos import Batch, PlainPhotos, Seen, ViewReader
from denoising_vit.training.samples import Sample, split
from denoising_vit.views.crops import Crop
from denoising_vit.views.rendering import to_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny.blank_panels():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), 6)


def damaged(photos: Path, folder: Path, *numbers: int) -> Path:
    """A copy of the photos, some of which are replaced by text."""
    shutil.copytree(photos, folder)
    for number in numbers:
        (folder / f"{number:02}.png").write_text("words")
    return folder


def reader(photos: Path, reports: Path, sizes: Sequence[tuple[int, int]] = ((48, 64),)) -> ViewReader:
    reports.mkdir(exist_ok=True)
    return ViewReader(PlainPhotos(open_dataset(photos)), tiny.backbone(), torch.device("cpu"), sizes, reports)


def whole(*images: int) -> list[Sample]:
    return [Sample(image, 0, None, Crop.whole((48, 64))) for image in images]


# --- views ---


def test_photos_come_in_the_requested_order(photos: Path) -> None:
    source = PlainPhotos(open_dataset(photos))
    found = list(source.stream([4, 0, 4]))
    assert [one.index for one in found if isinstance(one, Seen)] == [4, 0, 4]
    assert isinstance(found[1], Seen)
    assert torch.equal(found[1].image, to_image(read_photo(photos / "00.png")))
    assert (len(source.ids), list(source.ids), list(source.images)) == (
        6,
        [f"{n:02}.png" for n in range(6)],
        [*range(6)],
    )
    assert source.identity == {"images": 6, "ids": open_dataset(photos).digest}


def test_views_are_the_crops_of_the_samples(photos: Path, tmp_path: Path) -> None:
    crops = [
        Crop((0.1, 0.2, 0.8, 0.9), (48, 64), flip=True),
        Crop((0, 0, 1, 1), (48, 64)),
        Crop((0, 0, 0.5, 1), (48, 64)),
    ]
    samples = [Sample(image, 0, None, crop) for image, crop in zip((2, 5, 0), crops, strict=True)]
    views = reader(photos, tmp_path)
    (batch,) = views.batches([samples])
    assert batch.samples == samples
    assert batch.fields is None
    assert batch.usable.tolist() == [True] * 3
    for view, sample in zip(batch.images, samples, strict=True):
        image = to_image(read_photo(photos / f"{sample.image:02}.png"))
        assert torch.equal(view, sample.crop.render(image, views.backbone.mean, views.backbone.std))
    assert views.skipped == {}


def test_batches_follow_the_plan_and_are_read_on_demand(photos: Path, tmp_path: Path) -> None:
    drawn: list[list[Sample]] = []

    def plan() -> object:
        for number in range(1000):
            drawn.append(whole(number % 6, (number + 1) % 6))
            yield drawn[-1]

    batches = reader(photos, tmp_path).batches(plan())  # pyright: ignore[reportArgumentType]
    for number in range(5):
        assert [sample.image for sample in next(batches).samples] == [number % 6, (number + 1) % 6]
    assert len(drawn) < 30


# --- unreadable photos ---


def test_unreadable_photo_is_all_zeros_and_reported_once(photos: Path, tmp_path: Path) -> None:
    views = reader(damaged(photos, tmp_path / "photos", 3), tmp_path / "reports")
    for batch in views.batches([whole(2, 3), whole(3, 3, 1)]):
        assert batch.usable.tolist() == [sample.image != 3 for sample in batch.samples]
        assert not batch.images[~batch.usable].any()
    (line,) = (tmp_path / "reports" / "unusable.jsonl").read_text().splitlines()
    assert "03.png" in line
    assert list(views.skipped) == ["03.png"]
    assert "not an image file" in views.skipped["03.png"]


def test_photo_that_was_reported_before_is_not_reported_again(photos: Path, tmp_path: Path) -> None:
    folder = damaged(photos, tmp_path / "photos", 3)
    for _ in range(2):
        list(reader(folder, tmp_path / "reports").batches([whole(3)]))
    assert len((tmp_path / "reports" / "unusable.jsonl").read_text().splitlines()) == 1


def run_of(photos: Path, run: Path, **changes: object) -> Distillation:
    return tiny.prepared(photos, run, training=tiny.options(held_out=1, **changes)).training()


def gradients_of(run: Distillation, batch: Batch) -> tuple[list[float], dict[str, Tensor]]:
    """Loss and its parts, and gradients of the student."""
    run.student.zero_grad()
    loss, parts = run._loss(run.student(batch.images), run.teacher(batch), batch.usable)
    loss.backward()
    return [float(loss.detach()), *map(float, parts)], tiny.gradients(run.student)


def test_unreadable_photos_have_no_influence_on_loss_and_gradients(photos: Path, tmp_path: Path) -> None:
    held_out = split(range(6), 1, 0)[1][0]
    bad, *good = (number for number in range(6) if number != held_out)
    run = run_of(damaged(photos, tmp_path / "photos", bad), tmp_path / "run")
    samples = [Sample(image, 0, None, Crop.whole((48, 48))) for image in (good[0], bad, good[1], good[2], bad)]
    readable = [sample for sample in samples if sample.image != bad]
    with_bad, without = (next(run.reader.batches([chosen])) for chosen in (samples, readable))
    assert with_bad.usable.tolist() == [True, False, True, True, False]
    loss, gradients = gradients_of(run, with_bad)
    expected, alone = gradients_of(run, without)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == alone.keys() and len(gradients) > 20
    for name, value in alone.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_placeholder_of_an_unreadable_photo_has_no_effect(photos: Path, tmp_path: Path) -> None:
    run = run_of(photos, tmp_path / "run")
    (batch,) = run.reader.batches([whole(0, 1, 2)])
    usable = torch.tensor([True, False, True])
    noise = batch.images.clone()
    noise[1] = torch.randn(noise[1].shape)
    first, second = (
        gradients_of(run, replace(batch, images=images, usable=usable)) for images in (batch.images, noise)
    )
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    for name, value in first[1].items():
        torch.testing.assert_close(second[1][name], value, rtol=1e-4, atol=1e-6)


def test_batches_without_readable_photos_do_not_change_the_weights(photos: Path, tmp_path: Path) -> None:
    held_out = split(range(6), 1, 0)[1]
    folder = damaged(photos, tmp_path / "photos", *(number for number in range(6) if number not in held_out))
    run = run_of(folder, tmp_path / "run", weight_decay=0, accumulate=2, ema=0.5)
    before = tiny.copied(run.student)
    progress = run.run()
    assert progress.step == 6
    tiny.assert_same(tiny.copied(run.student), before)
    for row in tiny.rows(tmp_path / "run", "train"):
        assert (row["loss"], row["mse"], row["cosine"], row["held"], row["gradient"]) == (0, 0, 0, 0, 0)
    assert len(run.reader.skipped) == 5


def test_batch_without_readable_photos_gives_zero_gradients(photos: Path, tmp_path: Path) -> None:
    """Every trained parameter needs one: other processes would wait for a missing gradient."""
    run = run_of(photos, tmp_path / "run")
    (batch,) = run.reader.batches([whole(0, 1)])
    _, gradients = gradients_of(run, replace(batch, usable=torch.zeros(2, dtype=torch.bool)))
    trained = {name for name, value in run.student.named_parameters() if value.requires_grad}
    assert gradients.keys() == trained
    assert not any(value.any() for value in gradients.values())


def test_run_reports_an_unreadable_photo_once_in_several_epochs(photos: Path, tmp_path: Path) -> None:
    held_out = split(range(6), 1, 0)[1][0]
    bad = (held_out + 1) % 6
    training = tiny.options(steps=8, held_out=1)  # three epochs
    job, progress = tiny.distilled(damaged(photos, tmp_path / "photos", bad), tmp_path / "run", training=training)
    assert progress.step == 8
    assert list(job.skipped) == [f"{bad:02}.png"]
    assert len((tmp_path / "run" / "unusable.jsonl").read_text().splitlines()) == 1
    again, _ = tiny.distilled(tmp_path / "photos", tmp_path / "run", training=training, resume=True)
    assert again.skipped == job.skipped


def test_unreadable_held_out_photos_are_left_out_of_evaluations(photos: Path, tmp_path: Path) -> None:
    held_out = split(range(6), 3, 0)[1]
    folder = damaged(photos, tmp_path / "photos", held_out[1])
    job = tiny.prepared(folder, tmp_path / "run", shown=tiny.views(sizes="48,64x48"))
    run = job.training()
    assert run.held_out.images == (held_out[0], held_out[2])
    assert set(run.sampler.images).isdisjoint(held_out)
    run.run()
    assert list(job.skipped) == [f"{held_out[1]:02}.png"]


def test_run_needs_a_readable_held_out_photo(photos: Path, tmp_path: Path) -> None:
    held_out = split(range(6), 3, 0)[1]
    folder = damaged(photos, tmp_path / "photos", *held_out)
    with pytest.raises(
        TrainError, match=r"none of the 3 held-out photos can be read; first reason: .*not an image file"
    ):
        tiny.prepared(folder, tmp_path / "run").training()


def test_run_without_readable_held_out_photos_can_be_restarted(photos: Path, tmp_path: Path) -> None:
    folder = damaged(photos, tmp_path / "photos", *split(range(6), 1, 0)[1])
    with pytest.raises(TrainError, match="none of the 1 held-out photos can be read"):
        tiny.prepared(folder, tmp_path / "run", training=tiny.options(held_out=1)).training()
    _, progress = tiny.distilled(folder, tmp_path / "run", training=tiny.options(held_out=2))
    assert progress.step == 6


def test_unreadable_photo_of_a_stored_field_ends_the_run(photos: Path, tmp_path: Path) -> None:
    backbone, folder = tiny.backbone(), Path(shutil.copytree(photos, tmp_path / "photos"))
    store = tiny_training.fit(folder, tmp_path / "store", backbone, size=tiny.SIZE)
    source = tiny_training.Stored(store, open_dataset(folder))
    run = tiny.prepared(source, tmp_path / "run", backbone, tiny.options(held_out=1)).training()
    (folder / f"{run.sampler.step(0)[0].image:02}.png").write_text("words")
    with pytest.raises(TrainError, match=r"\.png: the target's photo cannot be read \(not an image file"):
        run.run()


# --- sources of photos ---


def test_class_folders_of_any_name_are_used(photos: Path, tmp_path: Path) -> None:
    for number, photo in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "train" / ("n01440764", "n01443537", "one more")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
    job, progress = tiny.distilled(tmp_path / "train", tmp_path / "run")
    assert progress.step == 6
    assert {name.split("/")[0] for name in job.photos.ids} == {"n01440764", "n01443537", "one more"}
    assert len(job.training().sampler.images) == 3


def test_shards_give_the_same_run_as_a_folder(photos: Path, tmp_path: Path) -> None:
    for number in range(2):
        tiny.write_shard(tmp_path / "shards" / f"s-{number}.tar", photos, 3 * number, 3)
    tiny.distilled(photos, tmp_path / "folder")
    tiny.distilled(open_dataset(f"{tmp_path}/shards/s-{{0,1}}.tar"), tmp_path / "run")
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "folder")


def test_truncated_shard_is_used_up_to_the_damage(photos: Path, tmp_path: Path) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", photos)
    place = open_dataset(shard)[4]
    assert place.start is not None and place.size is not None
    shard.write_bytes(shard.read_bytes()[: place.start + place.size // 2])
    dataset = open_dataset(shard)
    job, progress = tiny.distilled(dataset, tmp_path / "run", training=tiny.options(held_out=1))
    assert progress.step == 6
    assert list(job.photos.ids) == [f"s.tar/{number:02}.png" for number in range(4)]
    assert "4 images before it are used" in dataset.skipped[0].reason


def test_shard_truncated_after_opening_loses_only_missing_photos(photos: Path, tmp_path: Path) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", photos)
    dataset = open_dataset(shard)
    last = dataset[5]
    assert last.start is not None
    held_out = split(range(6), 1, 1)[1]
    assert 5 not in held_out
    shard.write_bytes(shard.read_bytes()[: last.start])
    job, progress = tiny.distilled(dataset, tmp_path / "run", training=tiny.options(held_out=1, seed=1))
    assert progress.step == 6
    assert list(job.skipped) == ["s.tar/05.png"]
    assert "the file has changed since the data set was opened" in job.skipped["s.tar/05.png"]


def test_shards_are_streamed_from_a_web_server(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    for number in range(2):
        tiny.write_shard(tmp_path / "shards" / f"s-{number}.tar", photos, 3 * number, 3)
    tiny.distilled(open_dataset(f"{tmp_path}/shards/s-{{0,1}}.tar"), tmp_path / "here")
    with tiny.served(tmp_path / "shards") as server:
        _, progress = tiny.distilled(open_dataset(f"{server.address}/s-{{0..1}}.tar"), tmp_path / "run")
    assert progress.step == 6
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "here")
    assert set(server.asked) == {"/s-0.tar", "/s-1.tar"}


# --- unreachable servers ---


@pytest.fixture
def listed(photos: Path, tmp_path: Path) -> Path:
    """A folder of photos with a list of them, for a web server."""
    pytest.importorskip("aiohttp")
    folder = Path(shutil.copytree(photos, tmp_path / "web"))
    (folder / "list.txt").write_text("".join(f"{number:02}.png\n" for number in range(6)))
    return folder


def test_unreachable_photo_is_requested_again(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos_module, "_AGAIN", (0, 0, 0))
    tiny.distilled(listed, tmp_path / "straight")
    with tiny.served(listed) as server:
        run = tiny.prepared(open_dataset(f"{server.address}/list.txt"), tmp_path / "run").training()
        server.away = 3
        progress = run.run()
    assert server.failed == 3
    assert progress.step == 6
    assert tiny.rows(tmp_path / "run") == tiny.rows(tmp_path / "straight")
    assert run.reader.skipped == {}


def test_unreachable_held_out_photos_are_requested_again(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos_module, "_AGAIN", (0, 0, 0))
    with tiny.served(listed) as server:
        job = tiny.prepared(open_dataset(f"{server.address}/list.txt"), tmp_path / "run")
        server.away = 3
        assert len(job.training().held_out.images) == 3
    assert server.failed == 3


def test_run_ended_by_an_unreachable_photo_can_be_resumed(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos_module, "_AGAIN", (0, 0))
    monkeypatch.setattr(photos_module, "_DECODED", 1)  # so that the first steps finish before the failure
    monkeypatch.setattr("denoising_vit.distilled.train._AHEAD", 1)
    training = tiny.options(checkpoint_every=1)
    tiny.distilled(listed, tmp_path / "straight", training=training)
    with tiny.served(listed) as server:
        source = open_dataset(f"{server.address}/list.txt")
        job = tiny.prepared(source, tmp_path / "run", training=training)
        run = job.training()

        def lose(step: int, _figures: dict[str, float]) -> None:
            server.away = 1000 if step == 2 else server.away

        with pytest.raises(TrainError, match=r"\d\d\.png: unreachable \(.*503.*\); continue from the last"):
            run.run(on_step=lose)
        assert 2 <= job.folder.checkpoints.step < 6
        assert job.skipped == {}
        server.away = 0
        tiny.distilled(source, tmp_path / "run", training=training, resume=True)
    assert tiny.results(tmp_path / "run") == tiny.results(tmp_path / "straight")


def test_evaluations_do_not_request_held_out_photos_again(listed: Path, tmp_path: Path) -> None:
    with tiny.served(listed) as server:
        run = tiny.prepared(open_dataset(f"{server.address}/list.txt"), tmp_path / "run").training()
        server.asked.clear()
        run.run()
    held_out = {f"/{image:02}.png" for image in run.held_out.images}
    assert not held_out & set(server.asked)
    assert len(list((tmp_path / "run" / "panels").iterdir())) == 2


def test_unreachable_photos_of_stored_fields_are_requested_again(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos_module, "_AGAIN", (0, 0))
    backbone = tiny.backbone()
    store = tiny_training.fit(listed, tmp_path / "store", backbone, size=tiny.SIZE)
    with tiny.served(listed) as server:
        source = tiny_training.Stored(store, open_dataset(f"{server.address}/list.txt"))
        training = tiny.options(held_out=1, learning_rate=1e-3)
        run = tiny.prepared(source, tmp_path / "run", backbone, training).training()
        server.away = 2
        assert run.run().step == 6
        assert server.failed == 2
        server.away = 1000
        with pytest.raises(TrainError, match=r"cannot be read \(.*503.*\); continue from the last"):
            tiny.prepared(source, tmp_path / "other", backbone, training).training()
