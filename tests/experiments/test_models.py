"""The real models against NumPy in float64, their known outputs, and lifted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from experiments import data
from tests.experiments import oracles

pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("tokenizers")

from experiments.models import minilm, resnet, sentences, stories, text

SENTENCES = [  # Of 13 to 24 word pieces.
    "A man is playing a guitar while he waits for the bus.",
    "The quick brown fox jumps over the lazy dog while it is raining outside.",
    "Café prices rose by 3.5% in 2011, to $2.80!",
]
TALE = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in"
    " the park. One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def bert() -> tuple[minilm.MiniLM, Any]:
    try:
        return minilm.load(scan=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vectors(bert: Any) -> np.ndarray:
    """Of `SENTENCES`; in two batches."""
    model, params = bert
    return sentences.encode(model.apply, params, SENTENCES, batch_size=2)


@pytest.fixture(scope="module")
def llama(data_dir: Path) -> tuple[stories.Stories, Any]:
    return stories.load(root=data_dir)


@pytest.fixture(scope="module")
def resnet20(data_dir: Path) -> tuple[resnet.ResNet, Any]:
    return resnet.load(20, root=data_dir)


@pytest.fixture(scope="module")
def logits20(resnet20: Any, data_dir: Path) -> np.ndarray:
    """Of all test images."""
    model, variables = resnet20
    return resnet.logits(model.apply, variables, data.cifar10("test", data_dir).x)


def int8(fn: Any, params: Any, *example: Any) -> Any:
    """All kernels in int8."""
    rules = {"**/kernel": jc.quant.int8()}
    # Jitted: one compilation instead of one for every shape of every step.
    return jax.jit(lambda p: jc.compress(p, rules, fn=fn, example=example))(params)


# MiniLM.


def test_minilm_equals_numpy(vectors: np.ndarray) -> None:
    ids = [encoding.ids for encoding in sentences.tokenizer().encode_batch(SENTENCES)]
    expected = oracles.bert(minilm.folder() / "model.safetensors", ids)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_minilm_unrolled_equals_scanned_and_ignores_padding(
    vectors: np.ndarray,
) -> None:
    model, params = minilm.load()
    ids, mask = np.zeros((3, 30), np.int32), np.zeros((3, 30), bool)
    for row, encoding in enumerate(sentences.tokenizer().encode_batch(SENTENCES)):
        ids[row, : len(encoding.ids)], mask[row, : len(encoding.ids)] = encoding.ids, 1
    actual = jax.jit(model.apply)(params, ids, mask)
    np.testing.assert_allclose(actual, vectors, atol=2e-6)


def test_minilm_lifted_in_int8(bert: Any, vectors: np.ndarray) -> None:
    model, params = bert
    example = np.zeros((1, 8), np.int32), np.ones((1, 8), bool)
    packed = int8(model.apply, params, *example)
    run = jc.lift(model.apply, on_dense="error")
    actual = sentences.encode(run, packed, SENTENCES, batch_size=3)
    cosines = (actual * vectors).sum(1)
    assert 0.99 < cosines.min() < cosines.max() < 1 - 1e-6


def test_batches_hold_every_sentence_once(bert: Any) -> None:
    texts = [" ".join(["rain"] * n) for n in (1, 300, 7, 30, 2, 11, 3)]
    seen = []
    for chosen, ids, mask in sentences.batches(texts, batch_size=2):
        assert ids.shape == mask.shape == (2, ids.shape[1])
        assert ids.shape[1] in sentences.BUCKETS
        assert mask.any(1).all()
        for row, i in enumerate(chosen):
            assert mask[row].sum() == min(len(texts[i].split()) + 2, 256)
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(texts)))


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 8))
    scores = rng.integers(0, 6, 20).astype(np.float64)  # With ties.
    pairs = data.Pairs(scores, [""] * 20, [""] * 20)
    cosines = (vectors[:20] * vectors[20:]).sum(1)
    expected = 100 * stats.spearmanr(scores, cosines).statistic
    assert sentences.spearman(pairs, vectors) == pytest.approx(expected)


# stories260K.


@pytest.fixture
def tales(data_dir: Path) -> list[np.ndarray]:
    """Beginnings of three stories, one of them shorter."""
    chosen = data.stories(1200, 1203, data_dir, length=30)
    return [chosen[0], chosen[1][:12], chosen[2]]


@pytest.fixture(scope="module")
def llama_arrays(data_dir: Path) -> dict[str, np.ndarray]:
    return data.load_npz("stories260k/stories260k.npz", data_dir)


def test_stories_equal_numpy(llama: Any, tales: Any, llama_arrays: Any) -> None:
    model, params = llama
    ids = np.stack([tales[0][:-1], tales[2][:-1]])
    logits = jax.jit(model.apply)(params, ids)
    expected = [oracles.llama(llama_arrays, row) for row in ids]
    np.testing.assert_allclose(logits, expected, atol=5e-5)


def test_mean_nll_is_the_mean_over_tokens(
    llama: Any, tales: Any, llama_arrays: Any
) -> None:
    model, params = llama
    losses = [oracles.nll(oracles.llama(llama_arrays, ids), ids) for ids in tales]
    actual = text.mean_nll(model.apply, params, tales, batch_size=2)
    assert actual == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)


def test_greedy_decoding_tells_the_known_story(llama: Any, data_dir: Path) -> None:
    model, params = llama
    pieces = text.Pieces.load(data_dir)
    expected = pieces.encode(TALE)
    assert text.greedy(model.apply, params, [text.BOS], len(expected)) == expected


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_decoding_in_parts_equals_numpy(
    scan: bool, llama_arrays: Any, data_dir: Path
) -> None:
    tokens = np.stack([i[:12] for i in data.stories(1200, 1202, data_dir)])
    model, params = stories.load(scan=scan, root=data_dir)
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    cache, parts = stories.init_cache(2, 16), []
    for start, stop in [(0, 4), (4, 8), (8, 12)]:
        logits, cache = decode(params, cache, tokens[:, start:stop], start)
        parts.append(logits)
    expected = [oracles.llama(llama_arrays, row) for row in tokens]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, atol=5e-5)
    assert cache.key.shape == (5, 2, 16, 4, 8)
    assert not np.asarray(cache.key)[:, :, 12:].any()


@pytest.fixture(scope="module")
def packed_llama(llama: Any) -> Any:
    model, params = llama
    return int8(model.apply, params, np.zeros((1, 8), np.int32))


def test_stories_lifted_in_int8(llama: Any, packed_llama: Any, tales: Any) -> None:
    model, params = llama
    run = jc.lift(model.apply, on_dense="error")
    loss = text.mean_nll(model.apply, params, tales, batch_size=2)
    quantized = text.mean_nll(run, packed_llama, tales, batch_size=2)
    assert 0 < abs(quantized - loss) < 0.01


def test_stories_decode_lifted(llama: Any, packed_llama: Any, data_dir: Path) -> None:
    model, _ = llama
    ids = text.Pieces.load(data_dir).encode("Once upon a time, there was a")
    run = jc.lift(model.apply, on_dense="error")
    assert text.greedy(run, packed_llama, [text.BOS], len(ids)) == ids


def test_pieces(data_dir: Path) -> None:
    pieces = text.Pieces.load(data_dir)
    assert pieces.encode("Once upon a time") == [1, 403, 407, 261, 378]
    stored = data.stories(0, 5, data_dir, length=100_000)
    whole = data.find("stories260k/tinystories_0000_1600.txt", data_dir)
    told = whole.read_text(encoding="utf-8").split("<|endoftext|>")
    for ids, tale in zip(stored, told, strict=False):
        assert pieces.encode(tale.strip()) == ids.tolist()
        assert pieces.decode(ids.tolist()) == tale.strip()
    assert pieces.decode(pieces.encode("naïve 猫")) == "naïve 猫"  # By bytes.


# ResNets.


def test_resnet20_equals_numpy(logits20: np.ndarray, data_dir: Path) -> None:
    images = data.cifar10("test", data_dir).x[:2]
    arrays = data.load_npz("cifar_resnets/resnet20.npz", data_dir)
    expected = oracles.resnet(arrays, images, 20)
    np.testing.assert_allclose(logits20[:2], expected, atol=1e-4)


@pytest.mark.slow
def test_resnet56_equals_numpy(data_dir: Path) -> None:
    model, variables = resnet.load(56, root=data_dir)
    images = data.cifar10("test", data_dir).x[:1]
    logits = resnet.logits(model.apply, variables, images, batch_size=2)
    arrays = data.load_npz("cifar_resnets/resnet56.npz", data_dir)
    expected = oracles.resnet(arrays, images, 56)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_resnet20_reproduces_its_score(logits20: np.ndarray, data_dir: Path) -> None:
    assert resnet.correct(logits20, data.cifar10("test", data_dir).y) == 915


def test_resnet_training_moves_the_running_statistics(
    resnet20: Any, data_dir: Path
) -> None:
    model, variables = resnet20
    x = jnp.asarray(resnet.normalize(data.cifar10("test", data_dir).x[:16]))
    step = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updates = jax.jit(step)(variables, x)
    assert logits.shape == (16, 10)
    arrays = data.load_npz("cifar_resnets/resnet20.npz", data_dir)
    y = oracles.convolve(np.asarray(x, np.float64), arrays["conv1.weight"])
    expected = 0.9 * arrays["bn1.running_mean"] + 0.1 * y.mean((0, 1, 2))
    actual = updates["batch_stats"]["bn1"]["mean"]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_resnet_lifted_in_int8(
    resnet20: Any, logits20: np.ndarray, data_dir: Path
) -> None:
    model, variables = resnet20
    images = data.cifar10("test", data_dir).x[:40]
    packed = int8(model.apply, variables, resnet.normalize(images[:1]))
    run = jc.lift(model.apply, on_dense="error")
    actual = resnet.logits(run, packed, images, batch_size=20)
    expected = logits20[:40]
    assert (actual.argmax(-1) == expected.argmax(-1)).sum() >= 39
    assert 0 < np.abs(actual - expected).max() < 1
