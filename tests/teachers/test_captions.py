"""The captions' own words as a teacher, against TF-IDF and SVD written from their equations."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import in_new_process

from protoclip_losses import EpisodicClusterer, FeatureBank, TeacherAdapter
from protoclip_losses.teachers import WordEncoder, captions, words

WORDS = ["cat", "dog", "bus", "car", "tree", "house", "sun", "moon", "red", "blue", "green", "old", "new", "small", "big", "fast"]


def make_captions(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, len(WORDS), (n, 5), generator=draw)
    return [" ".join(WORDS[i] for i in row[: 2 + k % 4]) for k, row in enumerate(numbers.tolist())]


CAPTIONS = make_captions(60)


def tf_idf(texts):
    """Dense float64 TF-IDF rows of length 1, and the vocabulary."""
    vocabulary = sorted({word for text in texts for word in words(text)})
    counts = np.array([[words(text).count(word) for word in vocabulary] for text in texts], dtype=np.float64)
    idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1
    weighted = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    return weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-300), vocabulary, idf


def features(texts, dim, new=None):
    """Rows of the SVD's first right singular vectors, L2-normalised; their signs do not matter to products of rows."""
    x, vocabulary, idf = tf_idf(texts)
    v = np.linalg.svd(x, full_matrices=False)[2][:dim].T
    if new is not None:
        counts = np.array([[words(text).count(word) for word in vocabulary] for text in new], dtype=np.float64)
        x = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    rows = x @ v
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- words ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A dog's BALL, 2 of them!", ["a", "dog", "s", "ball", "2", "of", "them"]),
        ("", []),
        ("!? \U0001f600", []),
        ("中", ["中"]),
        ("柴犬の子。ボール", ["柴犬", "犬の", "の子", "ボー", "ール"]),
        ("ｶﾞﾗｽ", ["ガラ", "ラス"]),
        ("红色iPhone手机", ["红色", "iphone", "手机"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("ภาษา", ["ภา", "าษ", "ษา"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("Straße ΣΊΣΥΦΟΣ cafe\u0301", ["strasse", "σίσυφοσ", "café"]),
        ("\ud800 lone", ["lone"]),
    ],
)
def test_words_of_any_script(caption, wanted):
    assert words(caption) == wanted


# --- values --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 4, 10])
def test_rows_are_those_of_tf_idf_and_svd(dim):
    teacher = TeacherAdapter.from_captions(CAPTIONS, dim=dim)
    got = teacher[torch.arange(60)]
    wanted = torch.from_numpy(features(CAPTIONS, dim))
    assert got.dtype == torch.float32
    assert got.shape == (60, dim)
    assert torch.allclose(got.double() @ got.double().T, wanted @ wanted.T, atol=2e-5)


def test_captions_not_seen_are_encoded_alike():
    teacher = TeacherAdapter.from_captions(CAPTIONS, dim=6)
    new = ["a RED Bus, red", *CAPTIONS[:3]]
    wanted, of_old = features(CAPTIONS, 6, new), features(CAPTIONS, 6)
    got, old = teacher.encode(new).double().numpy(), teacher[torch.arange(60)].double().numpy()
    assert np.allclose(got @ old.T, wanted @ of_old.T, atol=2e-5)
    assert np.array_equal(got[1:], old[:3])


def test_a_caption_without_a_known_word_has_a_row_of_zeros():
    texts = [*CAPTIONS, "", "!?"]
    teacher = TeacherAdapter.from_captions(texts, dim=6)
    assert torch.equal(teacher[torch.tensor([60, 61])], torch.zeros(2, 6))
    assert torch.equal(teacher.encode(["zebra", "\ud800"]), torch.zeros(2, 6))
    assert torch.allclose(teacher[torch.arange(60)].norm(dim=1), torch.ones(60))


def test_a_caption_whose_words_the_components_leave_out_has_a_row_of_zeros():
    """What is left of it is rounding, and would be a cluster by accident."""
    texts = ["red cat"] * 30 + ["blue dog"] * 20 + ["xyzzy plugh"]
    teacher = TeacherAdapter.from_captions(texts, dim=2)
    assert torch.equal(teacher[torch.tensor([50])], torch.zeros(1, 2))


def test_columns_that_the_captions_cannot_fill_are_zero():
    teacher = TeacherAdapter.from_captions(CAPTIONS, dim=128)
    got, wanted = teacher[torch.arange(60)].double(), torch.from_numpy(features(CAPTIONS, 128))
    assert got.shape == (60, 128)
    assert not got[:, len(WORDS) :].any()
    assert torch.allclose(got @ got.T, wanted @ wanted.T, atol=2e-5)


def test_one_word_is_enough():
    assert torch.equal(
        TeacherAdapter.from_captions(["cat", "Cat", "!"], dim=2)[torch.arange(3)].norm(dim=1), torch.tensor([1.0, 1, 0])
    )


def test_a_tokenizer_of_ones_own():
    teacher = TeacherAdapter.from_captions(["a-b", "b-c", "c-d"], dim=2, tokenizer=lambda text: text.split("-"))
    assert teacher.encode(["a-zzz"]).norm() == pytest.approx(1)
    assert teacher.encode(["a b"]).norm() == 0


def test_the_same_captions_give_the_same_bits():
    threads = torch.get_num_threads()
    rows = [TeacherAdapter.from_captions(CAPTIONS, dim=6)[torch.arange(60)] for _ in range(2)]
    assert torch.equal(*rows)
    assert torch.get_num_threads() == threads


def test_global_random_numbers_change_nothing_and_are_not_drawn():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = TeacherAdapter.from_captions(CAPTIONS, dim=6)[torch.arange(60)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    np.random.seed(2)
    assert torch.equal(TeacherAdapter.from_captions(CAPTIONS, dim=6)[torch.arange(60)], first)


def test_more_captions_than_are_fitted_on_are_all_encoded(monkeypatch):
    """Fitted on a drawn half, each row is the one that its own words have."""
    monkeypatch.setattr(captions, "FITTED_ON", 200)
    monkeypatch.setattr(captions, "BLOCK", 64)
    texts = make_captions(400)
    teacher = TeacherAdapter.from_captions(texts, dim=len(WORDS))
    rows = teacher[torch.arange(400)].double()
    of_all = torch.from_numpy(features(texts, len(WORDS)))
    assert torch.allclose(rows.norm(dim=1), torch.ones(400).double())
    # With all directions, only the words' weights tell the two fits apart.
    assert torch.allclose(rows @ rows.T, of_all @ of_all.T, atol=0.1)
    assert torch.equal(teacher.encode(texts).double(), rows)


# --- labels --------------------------------------------------------------------------------------------------------------------


def test_a_caption_without_a_known_word_gets_no_label_and_is_counted():
    texts = [*CAPTIONS, "", "!?"]
    index = torch.arange(62)
    bank = FeatureBank(index, dim=3)
    draw = torch.Generator().manual_seed(3)
    bank.update(index, torch.randn(62, 3, generator=draw), torch.randn(62, 3, generator=draw))
    prototypes = EpisodicClusterer(5).build(bank, {"words": TeacherAdapter.from_captions(texts, dim=6)})
    labels = prototypes.terms["image", "words"].labels
    assert labels[60:].tolist() == [-1, -1]
    assert int((labels[:60] < 0).sum()) == 0
    assert prototypes.report.unlabelled["words"] == 2
    assert prototypes.report.scalars()["words/unlabelled"] == 2


# --- the cache -----------------------------------------------------------------------------------------------------------------


class Fits:
    """Counts calls of WordEncoder.fit."""

    def __init__(self, monkeypatch):
        self.count, fit = 0, WordEncoder.fit.__func__

        def counted(cls, *args, **kwargs):
            self.count += 1
            return fit(cls, *args, **kwargs)

        monkeypatch.setattr(WordEncoder, "fit", classmethod(counted))


def test_a_cache_is_read_and_not_fitted_again(tmp_path, monkeypatch):
    fits = Fits(monkeypatch)
    first = TeacherAdapter.from_captions(CAPTIONS, 6, tmp_path / "new" / "words.npy")
    again = TeacherAdapter.from_captions(CAPTIONS, 6, str(tmp_path / "new" / "words.npy"))
    memory = TeacherAdapter.from_captions(CAPTIONS, 6)
    assert fits.count == 2
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == ["words.npy", "words.npy.json", "words.npy.words.npz"]
    for teacher in (again, memory):
        assert torch.equal(teacher[torch.arange(60)], first[torch.arange(60)])
        assert torch.equal(teacher.encode(["red dog"]), first.encode(["red dog"]))


@pytest.mark.parametrize("lost", ["words.npy", "words.npy.json", "words.npy.words.npz"])
def test_a_cache_that_lost_a_file_is_right_or_an_error(tmp_path, lost):
    cache = tmp_path / "words.npy"
    wanted = TeacherAdapter.from_captions(CAPTIONS, 6, cache)[torch.arange(60)]
    (tmp_path / lost).unlink()
    if lost == "words.npy.json":
        with pytest.raises(ValueError, match="must have its record"):
            TeacherAdapter.from_captions(CAPTIONS, 6, cache)
    else:
        assert torch.equal(TeacherAdapter.from_captions(CAPTIONS, 6, cache)[torch.arange(60)], wanted)


def test_a_cache_of_other_captions_or_another_width_is_an_error(tmp_path):
    TeacherAdapter.from_captions(CAPTIONS, 6, tmp_path / "words.npy")
    with pytest.raises(ValueError, match=r"words\.npy was made from other texts"):
        TeacherAdapter.from_captions(CAPTIONS[::-1], 6, tmp_path / "words.npy")
    with pytest.raises(ValueError, match=r"words\.npy holds rows of width 6, got an encoder of width 5"):
        TeacherAdapter.from_captions(CAPTIONS, 5, tmp_path / "words.npy")


def test_a_run_killed_between_fit_and_rows_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "encode_over_ranks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        TeacherAdapter.from_captions(CAPTIONS, 6, tmp_path / "words.npy")
    monkeypatch.undo()
    fits = Fits(monkeypatch)
    rows = TeacherAdapter.from_captions(CAPTIONS, 6, tmp_path / "words.npy")[torch.arange(60)]
    assert fits.count == 0
    assert torch.equal(rows, TeacherAdapter.from_captions(CAPTIONS, 6)[torch.arange(60)])


# --- errors and copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ("a cat", {}, TypeError, "texts"),
        ([1, 2], {}, TypeError, "texts"),
        ([], {}, ValueError, "texts must hold words, got none in 0 captions"),
        (["", "!?"], {}, ValueError, "texts must hold words, got none in 2 captions"),
        (CAPTIONS, {"dim": 0}, ValueError, "dim must be"),
        (CAPTIONS, {"dim": 2.5}, TypeError, "dim must be"),
        (CAPTIONS, {"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_bad_input(texts, settings, error, message):
    with pytest.raises(error, match=message):
        TeacherAdapter.from_captions(texts, **settings)


def test_an_encoder_of_tensors_that_do_not_fit_is_an_error():
    with pytest.raises(ValueError, match="components must have 2 rows as vocabulary has words"):
        WordEncoder(["a", "b"], torch.ones(2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"idf must have shape \(2,\) as vocabulary has words"):
        WordEncoder(["a", "b"], torch.ones(3), torch.ones(2, 4))


def test_without_scikit_learn_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn.feature_extraction.text'] = None\n"
        "from protoclip_losses import TeacherAdapter\n"
        "try: TeacherAdapter.from_captions(['a b', 'c'])\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install 'protoclip-losses[captions]'" in in_new_process(code)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_encode_alike(copied):
    teacher = TeacherAdapter.from_captions(CAPTIONS, dim=6)
    assert torch.equal(copied(teacher).encode(["red dog"]), teacher.encode(["red dog"]))


def test_a_state_goes_on_in_another_process(tmp_path):
    """A stream's teacher is fitted on its first captions, and the process that resumes has others."""
    teacher = TeacherAdapter.from_captions(CAPTIONS, dim=6)
    torch.save(teacher.state_dict(), tmp_path / "state.pt")
    code = (
        "import torch; from protoclip_losses import TeacherAdapter\n"
        "teacher = TeacherAdapter.from_captions(['quite other words', 'one more'], dim=6)\n"
        f"teacher.load_state_dict(torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True))\n"
        f"torch.save(teacher.encode(['red dog', 'other']), {str(tmp_path / 'rows.pt')!r})"
    )
    in_new_process(code)
    assert torch.equal(torch.load(tmp_path / "rows.pt"), teacher.encode(["red dog", "other"]))


def test_a_state_of_another_kind_of_teacher_is_refused_and_nothing_changes():
    teacher = TeacherAdapter.from_captions(CAPTIONS, dim=6)
    rows = teacher.encode(["red dog"])
    with pytest.raises(ValueError, match="words"):
        teacher.load_state_dict(TeacherAdapter.from_tensor(torch.randn(5, 6)).state_dict())
    with pytest.raises(ValueError, match="words"):
        TeacherAdapter.from_tensor(torch.randn(5, 6)).load_state_dict(teacher.state_dict())
    with pytest.raises(ValueError, match="dim"):
        teacher.load_state_dict(TeacherAdapter.from_captions(CAPTIONS, dim=5).state_dict())
    assert torch.equal(teacher.encode(["red dog"]), rows)


def test_the_idf_is_that_of_the_equation():
    encoder = WordEncoder.fit(["a b", "a c", "a"], dim=2)
    assert encoder.vocabulary == ["a", "b", "c"]
    assert encoder.idf.tolist() == pytest.approx([1.0, 1 + math.log(4 / 2), 1 + math.log(4 / 2)])
    assert repr(encoder) == "WordEncoder(3 words -> 2)"
