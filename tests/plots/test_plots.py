"""Pictures are drawn from real pairs, looked at as pixels, and leave no trace in matplotlib's global state."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from pair_files import emoji_with_groups
from PIL import Image

from protoclip_losses import EpisodeReport, EpisodicClusterer, FeatureBank, plots
from protoclip_losses.plots._style import COLOURS
from protoclip_losses.plots.loss_curves import running_mean


@pytest.fixture(scope="module")
def emoji():
    pairs, groups = emoji_with_groups()
    pixels = torch.nn.functional.adaptive_avg_pool2d(pairs.pictures.float() / 255, 4).flatten(1)
    return pairs, pixels - pixels.mean(0), groups


def pixels_of(path):
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB")).astype(int)


def colour_shares(path, *colours):
    """Share of the pixels that are (nearly) of each colour."""
    image = pixels_of(path)
    wanted = [np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in colours]
    return [float((np.abs(image - colour).max(2) < 24).mean()) for colour in wanted]


def records(steps=200):
    out = []
    for step in range(steps):
        on = 20 <= step < 180
        terms = {"contrastive_loss": 4 - step / 100, "proto_loss": 3.0 * on, "proto_external_loss": 0.0}
        out.append({"step": step, "loss": sum(terms.values()), **terms, "logit_scale": 14 + step / 50, "logit_scale_proto": 14.0})
    return out


def test_loss_curves_draw_the_terms_that_occur(tmp_path):
    path = plots.loss_curves(records(), tmp_path / "loss.png")
    info_nce, proto, external = colour_shares(path, "#0072b2", "#e69f00", "#009e73")
    assert path == tmp_path / "loss.png"
    assert min(info_nce, proto) > 1e-3
    assert external < 1e-4


def episodes(image, text, number, clusterer=None):
    """The report of the last of as many episodes, in which the features move."""
    clusterer = clusterer or EpisodicClusterer(40, niter=5)
    for step in range(number):
        moved = torch.nn.functional.normalize(image + 0.02 * step * image.roll(1, 0), dim=1)
        prototypes = clusterer.build(FeatureBank.from_features(torch.arange(len(image)), image=moved, text=text))
    return prototypes.report


def test_an_episode_has_a_panel_for_what_there_is(emoji, tmp_path):
    """Sizes always, agreement with a second clustering, changes from the second episode on; each clustering in its colour."""
    image = torch.nn.functional.normalize(emoji[1], dim=1)
    first, third = (episodes(image, image.roll(7, 0), number) for number in (1, 3))
    paths = [report.plot(tmp_path / f"{i}.png") for i, report in enumerate((first, third))]
    alone = EpisodeReport({}, {}, sizes={"words": (5, 3, 0)})
    paths.append(plots.episode_report(alone, tmp_path / "2.png"))
    heights = [len(pixels_of(path)) for path in paths]
    assert heights[1] - heights[0] == pytest.approx(heights[0] - heights[2], abs=2)
    assert min(colour_shares(paths[1], *COLOURS[:2])) > 1e-3
    assert colour_shares(paths[1], COLOURS[2])[0] < 1e-5
    assert colour_shares(paths[2], COLOURS[1])[0] < 1e-5


def test_an_episodes_lines_are_its_history(emoji):
    image = torch.nn.functional.normalize(emoji[1], dim=1)
    clusterer = EpisodicClusterer(40, niter=5)
    report = episodes(image, image.roll(7, 0), 3, clusterer)
    agreement = ["image-text/ami", "image-text/ari"]
    changes = [f"{name}/{what}" for name in ("image", "text") for what in ("changed", "drift")]
    assert [sorted(values) for values in report.history] == [agreement, *[sorted(agreement + changes)] * 2]
    assert report.history[2].items() <= report.scalars().items()
    assert sum(report.sizes["image"]) == len(image)
    resumed = EpisodicClusterer(40, niter=5)
    resumed.load_state_dict(clusterer.state_dict())
    later = episodes(image, image.roll(7, 0), 1, resumed)
    assert later.history[:3] == report.history
    assert len(later.history) == 4


def test_running_mean_restarts_after_a_gap():
    nan = float("nan")
    got = running_mean([1.0, 3.0, 5.0, nan, 7.0, 9.0], 2)
    np.testing.assert_allclose(got, [1, 2, 4, nan, 7, 8])


def test_modality_map_shows_every_category_and_both_modalities(emoji, tmp_path):
    _, image, groups = emoji
    names = [f"group {i}" for i in range(9)]
    path = plots.modality_map(image, image.roll(1, 0) + 1.0, groups, names, str(tmp_path / "map.png"))
    assert min(colour_shares(path, *COLOURS[:9])) > 1e-4
    path = plots.modality_map(image, image + 1.0, None, None, tmp_path / "plain.png")
    both = colour_shares(path, *COLOURS[:3])
    assert min(both[:2]) > 1e-4
    assert both[2] < 1e-5


def test_modality_map_of_more_categories_than_colours(emoji, tmp_path):
    """The eleven largest keep a colour each, the others share grey; the legend is no longer than the picture is high."""
    _, image, _ = emoji
    names = [f"a category of many, number {i}" for i in range(60)]
    categories = torch.arange(len(image)).remainder(60).where(torch.arange(len(image)) % 3 > 0, torch.arange(len(image)) % 11)
    path = plots.modality_map(image, image + 1.0, categories, names, tmp_path / "map.png")
    shares = colour_shares(path, *COLOURS)
    assert min(shares) > 1e-4
    drawn = np.nonzero((np.abs(pixels_of(path) - [0x7F] * 3).max(2) < 24)[:, :1000].any(1))[0]
    assert np.ptp(drawn) > 500  # of 924 rows: the legend leaves the points their room


def test_modality_map_of_features_of_any_finite_scale(emoji, tmp_path):
    _, image, groups = emoji
    names = [f"group {i}" for i in range(9)]
    text = image.roll(1, 0) + 1.0
    want = pixels_of(plots.modality_map(image.double(), text.double(), groups, names, tmp_path / "a.png"))
    for scale in (2.0**300, 2.0**-600):
        got = plots.modality_map(image.double() * scale, text.double(), groups.short(), names, tmp_path / "b.png")
        assert (pixels_of(got) == want).mean() > 0.999


def test_dollar_signs_are_no_formulas(tmp_path):
    names = ["$x_{ costs $5", "b"]
    assert plots.modality_map(X, X, torch.tensor([0, 0, 1, 1]), names, tmp_path / "a.png").exists()
    assert plots.cluster_grid(PICTURES, torch.zeros(4, dtype=torch.int32), ["$x_{ costs $5"] * 4, tmp_path / "b.png").exists()


def test_a_single_record_is_visible(tmp_path):
    path = plots.loss_curves([{"step": 3, "loss": 1.5, "contrastive_loss": 1.0, "logit_scale": 14.0}], tmp_path / "one.png")
    rows = np.nonzero((np.abs(pixels_of(path) - [0x00, 0x72, 0xB2]).max(2) < 24)[:, :900].sum(1))[0]
    assert len(rows) > 10  # left of the legends: the dots of the loss and of the scale


@pytest.mark.parametrize("per_cluster", [1, 2, 7])
def test_a_narrow_cluster_grid_leaves_room_for_its_title(per_cluster, tmp_path):
    path = plots.cluster_grid(
        PICTURES[:2], torch.zeros(2, dtype=torch.int64), ["a", "b"], tmp_path / "g.png", per_cluster=per_cluster
    )
    dark = (pixels_of(path) < 128).all(2)[:70]
    assert dark.any()
    assert not dark[:, -5:].any()


def test_cluster_grid_shows_pictures_of_one_cluster_in_a_row(tmp_path):
    colours = torch.tensor([[200, 30, 30], [30, 160, 30], [30, 30, 200]], dtype=torch.uint8)
    labels = torch.arange(30) % 3
    pictures = colours[labels][:, :, None, None].expand(-1, -1, 16, 16)
    path = plots.cluster_grid(pictures, labels, ["caption"] * 30, tmp_path / "grid.png", per_cluster=4)
    image = pixels_of(path)
    rows = [np.nonzero((np.abs(image - colour.numpy().astype(int)).max(2) < 24).sum(1) > 200)[0] for colour in colours]
    assert all(len(row) > 50 for row in rows)
    assert all(a.max() < b.min() for a, b in itertools.pairwise(rows))


def test_cluster_grid_takes_pictures_that_are_read_on_demand(emoji, tmp_path):
    pairs, _, groups = emoji

    class OnDemand:
        asked = 0

        def __getitem__(self, index):
            self.asked += len(index)
            return pairs.pictures[index]

    pictures = OnDemand()
    plots.cluster_grid(pictures, groups - 1, list(pairs.captions), tmp_path / "grid.png", num_clusters=3, per_cluster=5)
    assert pictures.asked == 15


def test_small_and_odd_input(tmp_path):
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert plots.modality_map(two.half(), two.half(), torch.tensor([0, 0]), ["a"], tmp_path / "a.png").exists()
    assert plots.loss_curves([{"step": 3, "loss": 1.0}], tmp_path / "b.png").exists()
    one = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert plots.cluster_grid(one, torch.tensor([4]), [""], tmp_path / "c.png").exists()


X, Y = torch.eye(4), torch.arange(4)
PICTURES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: plots.episode_report(EpisodeReport({}, {}), p),
            "report must have the sizes of clusters, got none: it is that of prototypes that were not built here",
        ),
        (lambda p: plots.loss_curves([], p), "records must have at least one record, got none"),
        (lambda p: plots.loss_curves([{"loss": 1.0}], p), "records must have a 'step' in each, got one without at position 0"),
        (
            lambda p: plots.loss_curves([{"step": 1, "other": 1.0}], p),
            "records must have a value other than zero of loss, .*",
        ),
        (lambda p: plots.modality_map(X, X[:3], None, None, p), r"text must have 4 rows as image, got shape \(3, 4\)"),
        (
            lambda p: plots.modality_map(X[:, :1], X[:, :1], None, None, p),
            r"image must have at least 2 .*, got shape \(4, 1\)",
        ),
        (lambda p: plots.modality_map(X / 0, X, None, None, p), "image must be finite, got NaN or Inf: 4 of 4 rows"),
        (lambda p: plots.modality_map(X, X, torch.arange(4), None, p), "categories and names must be given together, got one"),
        (lambda p: plots.modality_map(X, X, torch.arange(3), ["a"] * 4, p), "categories must have 4 entries as image .*, got 3"),
        (lambda p: plots.modality_map(X, X, torch.arange(4), ["a"], p), r"categories must lie in \[0, 1\) as names .*, got 1"),
        (lambda p: plots.cluster_grid(PICTURES, torch.arange(3), ["a"] * 4, p), "labels must have 4 entries as captions, got 3"),
        (
            lambda p: plots.cluster_grid(PICTURES[:3], torch.arange(4), ["a"] * 4, p),
            r"pictures must have shape \(4, 3, H, W\) as labels, got shape \(3, 3, 8, 8\)",
        ),
        (
            lambda p: plots.cluster_grid(PICTURES, torch.arange(4) - 9, ["a"] * 4, p),
            "labels must be 0 or more for at least one row, got no row that is in a cluster",
        ),
        (lambda p: plots.cluster_grid(PICTURES, Y, ["a"] * 4, p, num_clusters=0), "num_clusters must be at least 1, got 0"),
        (lambda p: plots.cluster_grid(PICTURES, Y, ["a"] * 4, p, per_cluster=0), "per_cluster must be at least 1, got 0"),
    ],
)
def test_bad_input_names_the_argument(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: plots.modality_map(X.long(), X, None, None, p), "image must be float16, .*, got torch.int64"),
        (lambda p: plots.modality_map(X, X, Y.float(), ["a"] * 4, p), "categories must be of an integer .*, got torch.float32"),
        (lambda p: plots.cluster_grid(PICTURES, Y.float(), ["a"] * 4, p), "labels must be of an integer .*, got torch.float32"),
        (lambda p: plots.cluster_grid(PICTURES, Y, "aaaa", p), "captions must be a list of strings, got a single str"),
    ],
)
def test_wrong_types_are_named(call, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        call(tmp_path / "x.png")


def test_pyplot_is_left_alone_and_a_missing_matplotlib_named(tmp_path):
    code = f"""
import sys
from protoclip_losses import plots
from protoclip_losses.plots._style import COLOURS
from protoclip_losses.plots.loss_curves import running_mean
assert "matplotlib" not in sys.modules
plots.loss_curves([{{"step": 1, "loss": 2.0}}], {str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
try:
    plots.loss_curves([{{"step": 1, "loss": 2.0}}], {str(tmp_path / "b.png")!r})
except ImportError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "pip install 'protoclip-losses[plots]'" in ended.stdout
