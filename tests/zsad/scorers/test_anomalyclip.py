"""Tests of AnomalyCLIP against its paper's formulas in loops: text tower, losses, scores, encoder outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from medad.base.errors import ConfigError
from tests.zsad.learned_sets import (
    category_features,
    cosine,
    dice,
    focal,
    shares,
    smoothed,
    square,
    up,
)
from tests.zsad.tiny_clip import tiny_clip, tiny_config
from zsad.clip import attention_paths, text_tower
from zsad.clip.attention_paths import AttentionPath, two_path
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore
from zsad.config.run import EncoderSettings
from zsad.scorers.anomalyclip.score import (
    AnomalyClipLearner,
    check_tower,
    object_words,
    prompt_ids,
    score,
    text_features,
)
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.learned import Weights
from zsad.scorers.weights_file import Checkpoint, CheckpointMetadata
from zsad.steps.results import Source
from zsad.steps.train import gather_crops

SMALL = AnomalyClip(context_tokens=3, deep_tokens=2, depth=2, tau=0.2, sigma_px=1.5)
CPU = torch.device("cpu")
SIZE = 32
PROMPTS = ("a photo of a bolt", "object", "a bright close-up photo of the damaged metal nut for visual inspection.")


def _custom(config: dict[str, Any]) -> open_clip.CustomTextCLIP:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = open_clip.CustomTextCLIP(**deepcopy(config)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def _model(kind: str) -> Any:
    config = tiny_config(quick_gelu=kind == "quick")
    config["text_cfg"]["layers"] = 4
    if kind == "eos":
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": 49407}
    if kind in {"linear", "custom linear"}:
        config["text_cfg"]["proj_bias"] = True
    if kind == "scaled":
        config["text_cfg"]["ls_init_value"] = 0.4
    return _custom(config) if kind.startswith("custom") else tiny_clip(config)


@pytest.mark.parametrize("kind", ["clip", "quick", "eos", "linear", "scaled", "custom", "custom linear"])
def test_without_learned_parts_it_is_the_models_own(kind: str) -> None:
    model = _model(kind)
    assert text_tower.unsupported_reason(model) is None
    ids = open_clip.SimpleTokenizer(context_length=32)(list(PROMPTS))
    embedded = text_tower.tower_of(model).token_embedding(ids)
    end = text_tower.end_of_text(model, ids)
    with torch.no_grad():
        own = model.encode_text(ids)
        torch.testing.assert_close(text_tower.encode_embeddings(model, embedded, end), own, atol=1e-5, rtol=0)
        # tokens after the end of the last prompt have no effect
        short = int(end.max()) + 1
        ours = text_tower.encode_embeddings(model, embedded[:, :short], end)
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"no_causal_mask": True}, "causal"),
        ({"embed_cls": True}, "causal"),
        ({"pool_type": "last"}, "end-of-text"),
        ({"proj_type": "none"}, "project"),
    ],
)
def test_other_towers_are_told_apart(change: dict[str, Any], reason: str) -> None:
    config = tiny_config()
    config["text_cfg"] |= change
    if "proj_type" in change:
        config["text_cfg"]["width"] = config["embed_dim"]
    unsupported_reason = text_tower.unsupported_reason(_custom(config))
    assert unsupported_reason is not None
    assert reason in unsupported_reason


def _layer(block: torch.nn.Module, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Compute one pre-norm layer with causal attention, token by token in float64."""
    state = {name: value.double().numpy() for name, value in block.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean()
        result: np.ndarray = (
            centred / math.sqrt((centred**2).mean() + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]
        )
        return result

    width, heads = len(tokens[0]), 2
    each = width // heads
    projected = [state["attn.in_proj_weight"] @ norm(x, "ln_1") + state["attn.in_proj_bias"] for x in tokens]
    out = []
    for place, token in enumerate(tokens):
        mixed = np.zeros(width)
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            query = projected[place][:width][part]
            weights = [
                math.exp(float(query @ projected[other][width : 2 * width][part]) / math.sqrt(each))
                for other in range(place + 1)
            ]
            for other, weight in enumerate(weights):
                mixed[part] += weight / sum(weights) * projected[other][2 * width :][part]
        x = token + state["attn.out_proj.weight"] @ mixed + state["attn.out_proj.bias"]
        hidden = state["mlp.c_fc.weight"] @ norm(x, "ln_2") + state["mlp.c_fc.bias"]
        hidden = np.array([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
        out.append(x + state["mlp.c_proj.weight"] @ hidden + state["mlp.c_proj.bias"])
    return out


@pytest.mark.parametrize("kind", ["clip", "custom"])
def test_deep_tokens_are_eq_3(kind: str) -> None:
    model = _model(kind)
    tower = text_tower.tower_of(model)
    generator = torch.Generator().manual_seed(2)
    words, deep = torch.randn(1, 7, 16, generator=generator), torch.randn(2, 2, 16, generator=generator)
    end = 5
    # t_1 enters T_1; q_m replaces the first Q tokens of the prompt, after the start, before T_2 and T_3 (M' = 3 of 4)
    tokens = list((words[0] + tower.positional_embedding[:7]).detach().double().numpy())
    tokens = _layer(tower.transformer.resblocks[0], tokens)
    for m in (2, 3):
        tokens = [tokens[0], *deep[m - 2].double().numpy(), *tokens[3:]]
        tokens = _layer(tower.transformer.resblocks[m - 1], tokens)
    tokens = _layer(tower.transformer.resblocks[3], tokens)
    last = tower.ln_final(torch.from_numpy(tokens[end]).float())
    expected = last @ tower.text_projection
    ours = text_tower.encode_embeddings(model, words, torch.tensor([end]), deep)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def encoder(learned_encoder: EncoderSettings) -> Encoder:
    return Encoder.load(learned_encoder, CPU)


@pytest.fixture(scope="module")
def source(sources: tuple[Source[Path], ...]) -> Source[Path]:
    return sources[0]


def _learner(encoder: Encoder, system: AnomalyClip, words: Sequence[str] = ("object",)) -> AnomalyClipLearner:
    return AnomalyClipLearner(system, encoder, prompt_ids(encoder, list(words), system))


def _weights(encoder: Encoder, system: AnomalyClip) -> Weights:
    weights = _learner(encoder, system).initial(torch.Generator().manual_seed(3))
    return {name: 20 * value for name, value in weights.items()}


@pytest.mark.parametrize(("full_stop", "stop"), [(False, ""), (True, ".")])
def test_prompts_are_those_of_section_3_2(encoder: Encoder, full_stop: bool, stop: str) -> None:
    system = SMALL.model_copy(update={"full_stop": full_stop})
    ids = prompt_ids(encoder, ["object", "metal nut"], system)
    assert ids.shape[:2] == (2, 2)
    for prompts, words in zip(ids.tolist(), ("object", "metal nut"), strict=True):
        for prompt, fixed in zip(prompts, (words, f"damaged {words}"), strict=True):
            start, *tokens, end = (token for token in encoder.tokenizer([fixed + stop])[0].tolist() if token)
            assert prompt[: 6 + len(tokens) - 1] == [start, 0, 0, 0, *tokens, end]
            assert not any(prompt[6 + len(tokens) - 1 :])


def test_learned_words_that_are_real_words_give_their_sentence(encoder: Encoder) -> None:
    """With V = "a photo of" and W = "photo of a", the features are those of the resulting sentences."""
    system = AnomalyClip(context_tokens=3, deep_tokens=0, full_stop=True)
    embedding = text_tower.tower_of(encoder.model).token_embedding
    said = encoder.tokenizer(["a photo of", "photo of a"])[:, 1:4]
    weights = {"normal": embedding(said[0]), "anomalous": embedding(said[1])}
    features = text_features(encoder, prompt_ids(encoder, ["object", "metal nut"], system), weights)
    for found, words in zip(features, ("object", "metal nut"), strict=True):
        sentences = [f"a photo of {words}.", f"photo of a damaged {words}."]
        torch.testing.assert_close(found, encoder.encode_text(sentences), atol=1e-5, rtol=0)


def test_words_by_the_form_of_the_prompt() -> None:
    assert object_words("metal_nut", AnomalyClip()) == "object"
    assert object_words("metal_nut", AnomalyClip(prompt="object_aware")) == "metal nut"


def test_what_does_not_fit_the_tower_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match=r"depth 9 .* has 2"):
        check_tower(encoder, AnomalyClip())
    check_tower(encoder, AnomalyClip(deep_tokens=0))
    exact = AnomalyClip(context_tokens=32 - 4, deep_tokens=0)
    assert prompt_ids(encoder, ["object"], exact).shape == (1, 2, 32)
    with pytest.raises(ConfigError, match="no room for 'damaged object'"):
        prompt_ids(encoder, ["object"], AnomalyClip(context_tokens=32 - 3, deep_tokens=0))
    with pytest.raises(ValueError, match="deep_tokens 4 must not exceed"):
        AnomalyClip(context_tokens=3)


def _text(encoder: Encoder, system: AnomalyClip, weights: Weights, words: str = "object") -> list[list[float]]:
    return [side.double().tolist() for side in text_features(encoder, prompt_ids(encoder, [words], system), weights)[0]]


def _maps(tokens: torch.Tensor, text: list[list[float]], tau: float) -> list[list[list[float]]]:
    """Return Up(S_n) and Up(S_a) of one crop."""
    pairs = [shares(cosine(t, text[0]) / tau, cosine(t, text[1]) / tau) for t in tokens.double().tolist()]
    return [up(square([pair[side] for pair in pairs]), SIZE) for side in (0, 1)]


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_scores_are_the_formulas(
    source: Source[Path], learned_encoder: EncoderSettings, encoder: Encoder, tmp_path: Path, blocks: tuple[int, ...]
) -> None:
    system = SMALL.model_copy(update={"blocks": blocks})
    weights = _weights(encoder, system)
    path = tmp_path / "checkpoint.safetensors"
    Checkpoint(CheckpointMetadata(system=system, encoder=None, paths=None), weights).write(path)
    given = category_features(source, learned_encoder, path)
    text = _text(encoder, system, weights)
    scored = {one.number: one for one in score(given, system)}
    assert sorted(scored) == list(range(len(given.store)))
    for number in (1, 2):  # one crop, and two
        classes = []
        for crop, token in enumerate(given.store.class_tokens(number).double().tolist()):
            classes.append(shares(cosine(token, text[0]) / system.tau, cosine(token, text[1]) / system.tau)[1])
            summed = np.zeros((SIZE, SIZE))
            for output in [f"vv-{block}" for block in blocks] or [""]:
                patches = given.store.patches(number) if not output else given.store.output(number, output)
                normal, anomalous = np.array(_maps(patches[crop], text, system.tau))
                summed += 0.5 * (1 - normal) + 0.5 * anomalous
            expected = smoothed(summed.tolist(), 1.5)
            np.testing.assert_allclose(scored[number].map[crop].numpy(), expected, atol=1e-5)
        assert scored[number].score == pytest.approx(sum(classes) / len(classes), abs=1e-5)


def test_the_last_block_alone_is_what_is_segmented_by_default(
    source: Source[Path], learned_encoder: EncoderSettings, encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Checkpoint(CheckpointMetadata(system=SMALL, encoder=None, paths=None), _weights(encoder, SMALL)).write(path)
    given = category_features(source, learned_encoder, path)
    last = SMALL.model_copy(update={"blocks": (3,)})
    for one, other in zip(score(given, SMALL), score(given, last), strict=True):
        torch.testing.assert_close(one.map, other.map, atol=1e-6, rtol=0)


@pytest.mark.parametrize("losses", [("global",), ("local",), ("global", "local")])
@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_the_loss_is_eq_2(
    source: Source[Path], encoder: Encoder, losses: tuple[str, ...], blocks: tuple[int, ...]
) -> None:
    system = AnomalyClip.model_validate({**SMALL.model_dump(), "losses": losses, "blocks": blocks, "lambda_local": 0.7})
    learner, weights = _learner(encoder, system), _weights(encoder, system)
    data, store = gather_crops([source]), FeatureStore(source.features)
    anomalous = next(i for i, crop in enumerate(data.crops) if data.mask(crop).any())
    normal = next(i for i, crop in enumerate(data.crops) if not data.mask(crop).any())
    chosen = [normal, anomalous, len(data.crops) - 1]
    text = _text(encoder, system, weights)
    expected = 0.0
    crops = [data.crops[i] for i in chosen]
    masks = [data.mask(crop).astype(float).tolist() for crop in crops]
    if "global" in losses:
        for crop, mask in zip(crops, masks, strict=True):
            token = store.class_tokens(crop.number)[crop.place].double().tolist()
            pair = shares(cosine(token, text[0]) / system.tau, cosine(token, text[1]) / system.tau)
            expected -= math.log(pair[any(map(any, mask))]) / len(crops)
    if "local" in losses:
        for output in [f"vv-{block}" for block in blocks] or [""]:
            maps = []
            for crop in crops:
                patches = store.patches(crop.number) if not output else store.output(crop.number, output)
                maps.append(_maps(patches[crop.place], text, system.tau))
            s_n, s_a = [pair[0] for pair in maps], [pair[1] for pair in maps]
            inverse = [[[1 - y for y in row] for row in mask] for mask in masks]
            expected += 0.7 * (focal(s_n, s_a, masks) + dice(s_n, inverse) + dice(s_a, masks))
    loss = learner.loss(weights, data.batch(chosen, learner.reads, CPU))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_each_crop_meets_the_words_of_its_own_category(source: Source[Path], encoder: Encoder) -> None:
    system = SMALL.model_copy(update={"prompt": "object_aware", "losses": ("global",)})
    names = ("bolt", "metal nut", "carpet")
    learner, weights = _learner(encoder, system, names), _weights(encoder, system)
    batch = gather_crops([source]).batch([0, 1, 2, 3], learner.reads, CPU)
    own = torch.tensor([2, 0, 2, 1])
    mixed = type(batch)(batch.class_tokens, batch.patches, batch.masks, own)
    texts = torch.tensor([_text(encoder, system, weights, names[i]) for i in own.tolist()])
    logits = torch.einsum("bd,bcd->bc", batch.class_tokens, texts.float()) / system.tau
    expected = cross_entropy(logits, batch.masks.flatten(1).any(1).long())
    torch.testing.assert_close(learner.loss(weights, mixed), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["vv", "qq", "kk"])
@pytest.mark.parametrize("blocks", [(0, 1, 2), (1, 2), (1,), (0, 2)])
def test_outputs_of_the_second_path_are_the_path_ended_there(
    attention: attention_paths.Attention, blocks: tuple[int, ...]
) -> None:
    """The path only sums up, so its value after block n is the result of a path without the later blocks."""
    visual = tiny_clip(tiny_config()).visual
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = attention_paths.tower_outputs(
            visual, images, AttentionPath(blocks, attention=attention), blocks=(0,), vv_blocks=(0, 1, 2)
        )
        for number in range(3):
            until = tuple(block for block in blocks if block <= number)
            if until:
                _, expected = two_path(visual, images, AttentionPath(until, attention=attention))
            else:
                expected = visual.ln_post(found.blocks[number][:, 1:]) @ visual.proj
            torch.testing.assert_close(found.vv_patches[number], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.vv_patches[2], found.patches)


def test_a_view_on_disk_is_normalised(source: Source[Path]) -> None:
    store = FeatureStore(source.features)
    values = store.output(0, "vv-2")
    torch.testing.assert_close(values, normalize(values, dim=-1))
    torch.testing.assert_close(store.output(0, "vv-3"), store.patches(0), atol=1e-6, rtol=0)
    assert not torch.allclose(values, store.patches(0), atol=1e-2)


def test_a_block_that_is_not_there_is_refused() -> None:
    visual = tiny_clip(tiny_config()).visual
    with pytest.raises(ValueError, match="0 to 2"):
        attention_paths.tower_outputs(visual, torch.zeros(1, 3, 32, 32), AttentionPath((1, 2)), vv_blocks=(3,))
