"""The teachers of open_clip's launcher: the words of the csv's captions, and files."""

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("pandas")  # open_clip's training code needs more than open_clip does
pytest.importorskip("sklearn")
import open_clip
from open_clip_runs import (
    BATCH,
    HEADS,
    ROWS,
    STILL,
    arguments,
    assert_same_end,
    csv,
    in_an_order_of_its_own,
    log,
    logged,
    train,
    webdataset,
)
from open_clip_train import main as host
from open_clip_train.params import parse_args

from protoclip_losses import EpisodicClusterer, FeatureBank, KMeans, KMeansResult, ProtoLoss, TeacherAdapter
from protoclip_losses.cluster import main as cluster
from protoclip_losses.integrations.open_clip import Launcher, main, parse_arguments
from protoclip_losses.integrations.open_clip.data import IndexedBatches

pytestmark = pytest.mark.usefixtures("tiny_model")
WORDS = ["--proto-teacher", "words", "--proto-teacher-dim", 8, "--proto-num-prototypes", 6, *HEADS]


@pytest.fixture
def built(monkeypatch):
    """The prototypes of each episode, and the widths of the rows that K-means was run on."""
    seen = {"prototypes": [], "widths": []}
    fit, build = KMeans.fit, Launcher._prototypes

    def counted_fit(self, x, **more):
        seen["widths"].append(x.shape[1])
        return fit(self, x, **more)

    def kept(self, *args):
        seen["prototypes"].append(build(self, *args))
        return seen["prototypes"][-1]

    monkeypatch.setattr(KMeans, "fit", counted_fit)
    monkeypatch.setattr(Launcher, "_prototypes", kept)
    return seen


@pytest.fixture(scope="module")
def captions(table):
    return [line.split("\t")[1] for line in table.read_text().splitlines()[1:]]


def test_words_are_clustered_once_and_nothing_else_if_nothing_else_has_a_weight(tmp_path, table, captions, built):
    train(main, tmp_path, "run", *WORDS, "--proto-weight", 0, *csv(table, "--epochs", 4))
    losses, steps = logged(tmp_path, "run", "Proto_external_loss"), ROWS // BATCH
    assert losses[:steps] == [0.0] * steps  # warm-up
    assert len(losses) == 4 * steps
    assert min(losses[steps:]) > 0.3
    assert set(logged(tmp_path, "run", "Proto_loss")) == {0.0}
    assert built["widths"] == [8]
    wanted = EpisodicClusterer(6, seed=0).fit_teacher(TeacherAdapter.from_captions(captions, 8))
    assert len(built["prototypes"]) == 3
    for prototypes in built["prototypes"]:
        assert set(prototypes.terms) == {("image", "words"), ("text", "words")}
        assert torch.equal(prototypes.labels_by_teacher["words"], wanted.labels)
    assert log(tmp_path, "run").count("--proto-teacher words: 0 of 48 captions have no known word") == 1


def test_several_teachers_beside_the_modalities(tmp_path, table, built):
    """A file's labels are those that clustering it in each episode gives: every epoch has all rows of the csv."""
    rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
    rows[3] = 0  # nothing is known of it
    np.save(tmp_path / "teacher.npy", rows.numpy())
    both = ["--proto-teacher", f"file={tmp_path / 'teacher.npy'}", *WORDS, "--proto-warmup-epochs", 0, "--proto-teacher-dim", 4]
    train(main, tmp_path, "run", *both, *csv(table))
    assert built["widths"] == [4, 4, 8, 8, 8, 8]  # both teachers once, both modalities in each of two epochs
    bank = FeatureBank.from_features(torch.arange(ROWS), image=rows, text=rows)
    episode = EpisodicClusterer(6, seed=0).build(bank, {"file": TeacherAdapter.from_tensor(rows, 4)})
    for prototypes in built["prototypes"]:
        assert {teacher for _, teacher in prototypes.terms} == {"image", "text", "file", "words"}
        assert torch.equal(prototypes.labels_by_teacher["file"], episode.labels_by_teacher["file"])
    assert min(logged(tmp_path, "run", "Proto_external_loss")) > 0.3


@pytest.mark.parametrize(
    "mode", [[], ["--proto-online", "--proto-queue-size", 48, "--proto-every", 2]], ids=["episodes", "online"]
)
def test_a_resumed_run_with_words_ends_where_an_uninterrupted_one_does(tmp_path, table, monkeypatch, mode):
    in_an_order_of_its_own(monkeypatch)
    common = [*WORDS, *mode, *csv(table, "--epochs", 3, *STILL)]
    train(main, tmp_path, "whole", *common)
    train(main, tmp_path, "rest", "--resume", tmp_path / "whole" / "checkpoints" / "epoch_2.pt", *common)
    assert_same_end(tmp_path, "rest", "whole", 3)
    assert logged(tmp_path, "rest", "Proto_external_loss")[-1] > 0.3


def launcher_with_data(folder, *data):
    """The launcher, and the training data as main makes them."""
    options, rest = parse_arguments(arguments(folder, "run", *WORDS, *data))
    args = parse_args(rest)
    args.distributed, args.world_size = False, 1
    launcher = Launcher(options)
    _, *transforms = open_clip.create_model_and_transforms("tiny")
    info = launcher.get_data(args, tuple(transforms), epoch=0, tokenizer=open_clip.get_tokenizer("tiny"))
    return launcher, info["train"]


def test_captions_are_those_that_open_clip_reads_and_an_empty_cell_is_none(tmp_path, caplog):
    texts = ["a red bus", "an old bus, green", "", "a nan oven", "12", "a small cat"]
    (tmp_path / "p.csv").write_text("what;path\n" + "".join(f"{text};{i}.png\n" for i, text in enumerate(texts)))
    columns = ["--csv-separator", ";", "--csv-caption-key", "what", "--csv-img-key", "path"]
    caplog.set_level("INFO")
    launcher, _ = launcher_with_data(tmp_path, *csv(tmp_path / "p.csv", *columns))
    index = torch.arange(6)
    assert torch.equal(launcher.teachers["words"][index], TeacherAdapter.from_captions(texts, 8)[index])
    assert launcher.teachers["words"][index].any(1).tolist() == [True, True, False, True, True, True]
    assert [r.getMessage() for r in caplog.records if "words" in r.getMessage()] == [
        "--proto-teacher words: 1 of 6 captions have no known word, and get no label"
    ]


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_online_mode_is_given_the_features_of_the_captions_of_each_step(tmp_path, table, captions, monkeypatch, accum_freq):
    forward, batches, texts, seen = ProtoLoss.forward, IndexedBatches.__iter__, [], []

    def watched_forward(self, *args, **inputs):
        assert inputs.get("index") is None
        seen.append(inputs["teacher_features"]["words"])
        return forward(self, *args, **inputs)

    def watched_batches(self):
        for images, tokens in batches(self):
            texts.append(tokens)
            yield images, tokens

    monkeypatch.setattr(ProtoLoss, "forward", watched_forward)
    monkeypatch.setattr(IndexedBatches, "__iter__", watched_batches)
    online = ["--proto-online", "--accum-freq", accum_freq, "--proto-warmup-steps", 3 // accum_freq]
    train(main, tmp_path, "run", *WORDS, *online, *csv(table, "--epochs", 3))
    assert logged(tmp_path, "run", "Proto_external_loss")[-1] > 0.3
    tokens = open_clip.get_tokenizer("tiny")(captions)
    encode = TeacherAdapter.from_captions(captions, 8).encode
    steps = [torch.cat(texts[i : i + accum_freq]) for i in range(0, len(texts), accum_freq)]
    for step, rows in zip(steps, seen[::accum_freq], strict=True):
        for text, row in zip(step, rows, strict=True):
            same = encode([caption for caption, t in zip(captions, tokens, strict=True) if torch.equal(t, text)])
            assert torch.isclose(same, row, atol=1e-6).all(1).any()
    assert len(seen) == 9


@pytest.mark.parametrize("mode", [[], ["--proto-online"]], ids=["episodes", "online"])
def test_words_of_a_webdataset_are_refused(tmp_path, shards, mode):
    with pytest.raises(
        ValueError, match=r"--proto-teacher needs --dataset-type csv: .* captions have to be known before training"
    ):
        train(main, tmp_path, "run", *WORDS, *mode, *webdataset(shards, "--epochs", 1))
    assert host.create_loss is open_clip.create_loss  # what was replaced is put back


def test_words_of_data_without_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--proto-teacher words needs the captions of a csv, got a SyntheticDataset"):
        train(main, tmp_path, "run", *WORDS, "--dataset-type", "synthetic", "--train-num-samples", 32)


def test_a_teacher_has_one_name(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--model", "tiny", "--proto-teacher", "words", "--proto-teacher", "words=file.npy"])
    assert "--proto-teacher must name each teacher once, got words words" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["--model", "tiny", "--proto-teacher", "word"])
    assert "must be words, NAME=FILE.npy or NAME=CLUSTERS, got 'word'" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [[], ["--proto-online"]], ids=["episodes", "online"])
@pytest.mark.parametrize(("rows", "word"), [(ROWS + 2, "has 50 rows for 48 samples"), (ROWS, None), (ROWS - 8, "")])
def test_the_rows_of_a_file_are_compared_with_the_data(tmp_path, table, rows, word, mode):
    np.save(tmp_path / "teacher.npy", np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32))
    teacher = ["--proto-teacher", f"words={tmp_path / 'teacher.npy'}", "--proto-teacher-dim", 4, *HEADS, *mode]
    if word == "":
        with pytest.raises(ValueError, match="must have a row for each of 48 samples, got 40"):
            train(main, tmp_path, "run", *teacher, *csv(table, "--epochs", 1))
        return
    train(main, tmp_path, "run", *teacher, *csv(table, "--epochs", 1))
    assert log(tmp_path, "run").count("rows for 48 samples") == (word is not None)
    assert word is None or word in log(tmp_path, "run")


# --- clusters of the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of rows more than the csv has, so that the first ones may be taken too."""
    folder = tmp_path_factory.mktemp("clustered")
    for rows in (ROWS - 8, ROWS, ROWS + 2):
        np.save(folder / "rows.npy", torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)).numpy())
        cluster([str(folder / "rows.npy"), "--num-clusters", "5", "--out", str(folder / str(rows)), "--quiet"])
    return folder


@pytest.mark.parametrize("form", ["folder", "file"])
def test_clusters_of_the_command_are_looked_up_and_not_made(tmp_path, table, folder, built, form):
    path = folder / str(ROWS) / ("clusters" if form == "file" else "")
    train(main, tmp_path, "run", "--proto-teacher", f"t={path}", *HEADS, "--proto-weight", 0, *csv(table, "--epochs", 3))
    assert built["widths"] == []
    result = KMeansResult.load(path)
    assert len(built["prototypes"]) == 2
    for prototypes in built["prototypes"]:
        assert set(prototypes.terms) == {("image", "t"), ("text", "t")}
        assert torch.equal(prototypes.labels_by_teacher["t"], result.labels)
    assert min(logged(tmp_path, "run", "Proto_external_loss")[ROWS // BATCH :]) > 0.3


def test_a_resumed_run_with_clusters_ends_where_an_uninterrupted_one_does(tmp_path, table, folder, monkeypatch):
    in_an_order_of_its_own(monkeypatch)
    common = ["--proto-teacher", f"t={folder / str(ROWS)}", *WORDS, *csv(table, "--epochs", 3, *STILL)]
    train(main, tmp_path, "whole", *common)
    train(main, tmp_path, "rest", "--resume", tmp_path / "whole" / "checkpoints" / "epoch_2.pt", *common)
    assert_same_end(tmp_path, "rest", "whole", 3)
    assert logged(tmp_path, "rest", "Proto_external_loss")[-1] > 0.3


def test_the_labels_of_clusters_are_compared_with_the_data(tmp_path, table, folder):
    with pytest.raises(ValueError, match=r"--proto-teacher: .*40 must have a row for each of 48 samples, got 40"):
        train(main, tmp_path, "few", "--proto-teacher", f"t={folder / str(ROWS - 8)}", *HEADS, *csv(table, "--epochs", 1))
    train(main, tmp_path, "more", "--proto-teacher", f"t={folder / str(ROWS + 2)}", *HEADS, *csv(table, "--epochs", 1))
    assert log(tmp_path, "more").count("--proto-teacher t has 50 rows for 48 samples") == 1


def test_what_cannot_be_taken_for_clusters_is_an_error_before_training(tmp_path, table, shards, folder):
    (tmp_path / "text").write_text("red bus\n" * 10)
    np.save(tmp_path / "rows.npy", np.zeros((ROWS, 6), np.float32))
    good = folder / str(ROWS)
    for path, data, error, message in (
        (
            good,
            ["--proto-online", *csv(table)],
            ValueError,
            "--proto-teacher t must have features with --proto-online, got clusters",
        ),
        (good, webdataset(shards), ValueError, "--proto-teacher needs --dataset-type csv"),
        (tmp_path / "text", csv(table), ValueError, "--proto-teacher must name .npy files or what .* got another kind of file"),
        (tmp_path / "none", csv(table), FileNotFoundError, "none"),
        (tmp_path, csv(table), FileNotFoundError, "clusters"),  # a folder of something else
    ):
        with pytest.raises(error, match=message):
            train(main, tmp_path, f"run {message[:30]}", "--proto-teacher", f"t={path}", *HEADS, *data, "--epochs", 1)
    (tmp_path / "rows.npy").rename(tmp_path / "features")  # whatever their file is called
    features = ["--proto-teacher", f"t={tmp_path / 'features'}", "--proto-teacher-dim", 4]
    train(main, tmp_path, "run", *features, *HEADS, *csv(table, "--epochs", 1))
