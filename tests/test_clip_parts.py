"""The parts of CLIP: byte pairs, the text tower and the ResNet against other ways to compute them, and its files."""

import gzip
import itertools
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from finetune import backbones, clip_files, clip_resnet, clip_text
from finetune.backbones import BackboneConfig
from finetune.optim import levels
from recipes.errors import UserError

WIDTH, LAYERS, CONTEXT, OUT = 128, 2, 12, 10
MERGES = [("r", "e"), ("re", "d</w>"), ("c", "o"), ("a", "t</w>"), ("co", "at</w>"), ("o", "o")]


class Block(nn.Module):
    """A block of the text tower as torch's own layers make it."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)  # True: not to be seen
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=later, need_weights=False)[0]
        wide = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(wide * torch.sigmoid(1.702 * wide))


class TextTower(nn.Module):
    """CLIP's text tower under its names, always over all positions."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(2 * 256 + 2 + len(MERGES), WIDTH)
        self.positional_embedding = nn.Parameter(0.3 * torch.randn(CONTEXT, WIDTH))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(0.1 * torch.randn(WIDTH, OUT))

    def forward(self, numbers: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        x = self.transformer.resblocks(self.token_embedding(numbers) + self.positional_embedding)
        return self.ln_final(x)[torch.arange(len(x)), ends] @ self.text_projection


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.manual_seed(0)
    made = TextTower().eval().requires_grad_(False)
    for name, value in made.named_parameters():
        if "bias" in name or "ln_" in name:
            value.add_(0.1 * torch.randn_like(value))
    return made


@pytest.fixture
def merges(tmp_path):
    """A list of merges as CLIP's, with a heading and more lines than are used."""
    path = tmp_path / "merges.txt.gz"
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), "never used", ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_bytes_have_clips_letters():
    letters = list(clip_text.byte_letters().values())
    assert len(set(letters)) == 256
    # numbers of CLIP's own list: "!" is 0, "a" is 64; with an end mark 256 more; a space is the letter 256 + 32
    assert (letters[0], letters[64], letters.index("Ġ")) == ("!", "a", 94 + 12 + 82 + 32)


def test_byte_pairs_by_hand():
    pairs = clip_text.BytePairs(MERGES)
    assert pairs.pieces("red") == ["red</w>"]
    assert pairs.pieces("coat") == ["coat</w>"]
    assert pairs.pieces("core") == ["co", "r", "e</w>"], "the end mark belongs to the letter, so r and e do not join"
    assert pairs.pieces("oooo") == ["oo", "o", "o</w>"], "from the left, and each letter once"
    assert pairs.pieces("reread") == ["re", "re", "a", "d</w>"]
    assert pairs.encode("red") == [518, 512 + 1, 519]
    assert pairs.encode("a") == [518, 256 + 64, 519]
    assert len(pairs.pieces("é")) == 2, "two bytes"


def test_word_vectors_are_those_of_torchs_own_layers(tower, merges, tmp_path):
    path = tmp_path / "clip.pth"
    torch.save(tower.state_dict(), path)
    words = ["red", "coat", "core", "x", "a" * 30]
    found = clip_text.word_vectors(path, merges, words)
    pairs = clip_text.BytePairs(MERGES)
    for row, word in enumerate(words):
        own = pairs.encode(word)
        own = own if len(own) <= CONTEXT else [*own[: CONTEXT - 1], pairs.end]
        numbers = torch.zeros(1, CONTEXT, dtype=torch.int64)  # padded with zeros to all positions, as CLIP does
        numbers[0, : len(own)] = torch.tensor(own)
        wanted = tower(numbers, torch.tensor([len(own) - 1]))
        np.testing.assert_allclose(found[row], wanted[0].numpy(), atol=2e-5)
    assert found.dtype == np.float32
    assert np.linalg.norm(found[0] - found[1]) > 0.1


def test_a_file_of_half_precision_and_with_wrappers_is_read(tower, merges, tmp_path):
    half = {f"module.{name}": value.half() for name, value in tower.state_dict().items()}
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    torch.save(tower.state_dict(), tmp_path / "whole.pt")
    ours, theirs = (clip_text.word_vectors(tmp_path / f"{name}.pt", merges, ["red"]) for name in ("half", "whole"))
    np.testing.assert_allclose(ours, theirs, atol=0.05)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("ln_final.weight", None, r"no text tower of CLIP: ln_final\.weight is missing"),
        ("transformer.resblocks.1.mlp.c_fc.weight", None, r"mlp\.c_fc\.weight .* has None"),
        ("transformer.resblocks.0.attn.in_proj_weight", torch.zeros(3, 3), r"shape \(384, 128\), and has \(3, 3\)"),
        ("token_embedding.weight", torch.zeros(500, WIDTH), "no text tower of CLIP"),
    ],
)
def test_what_is_no_text_tower_is_refused(tower, key, change, message):
    state = dict(tower.state_dict())
    state.pop(key) if change is None else state.update({key: change})
    with pytest.raises(UserError, match=message):
        clip_text.tower_of(state, "FILE")


def test_a_damaged_list_of_merges_is_refused(merges, tmp_path):
    with pytest.raises(UserError, match="does not hold the 9 byte pairs"):
        clip_text.read_merges(merges, 9)
    (tmp_path / "cut.gz").write_bytes(merges.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cut\.gz cannot be read"):
        clip_text.read_merges(tmp_path / "cut.gz", 3)
    assert clip_text.read_merges(merges, 6) == MERGES
    with pytest.raises(UserError, match=r"gone\.pt"):
        clip_files.read(tmp_path / "gone.pt")


def test_a_program_of_torchscript_gives_its_weights(tower, tmp_path):
    """The files that CLIP's authors publish are such programs."""
    shared = nn.Module()
    shared.visual, shared.text = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Linear(4, 2).half()
    shared.scale = nn.Parameter(torch.tensor(2.5))

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.text, self.scale, self.size = shared.visual, shared.text, shared.scale, 7

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.visual(x) * self.scale

    model = Program().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch wants nobody to write such files any more
        torch.jit.trace(model, torch.zeros(1, 3, 2, 2), check_trace=False).save(str(tmp_path / "program.pt"))
    found = clip_files.read(tmp_path / "program.pt")
    wanted = {name: value for name, value in model.state_dict().items() if name != "visual.1.num_batches_tracked"}
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach())


def test_a_program_that_wants_more_than_data_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    path = tmp_path / "harm.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("harm/data.pkl", pickle.dumps(Harm(), protocol=2))
        archive.writestr("harm/code/x.py", "")
    with pytest.raises(UserError, match=r"harm\.pt cannot be read as a saved program .*it wants"):
        clip_files.read(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"harm\.pt"):
        clip_files.read(path)


def resnet(size: tuple[int, int], width: int = 64) -> clip_resnet.ClipResNet:
    """Fewer blocks than the published ones, and a shorter feature."""
    torch.manual_seed(0)
    return clip_resnet.ClipResNet((1, 2, 1, 1), width, 24, size).eval()


def test_the_whole_network_has_the_weights_of_clips_resnet50():
    """Names and shapes as in the published file: 1 + 49 positions for 224 pixels, 38.3 million numbers."""
    with torch.device("meta"):
        model = timm.create_model("clip_resnet50", img_size=(112, 112))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert state["attnpool.positional_embedding"] == (50, 2048)
    assert state["attnpool.c_proj.weight"] == (1024, 2048)
    assert state["conv1.weight"] == (32, 3, 3, 3)
    assert state["layer4.0.downsample.0.weight"] == (2048, 1024, 1, 1)
    assert state["layer4.2.bn3.running_var"] == (2048,)
    assert sum(value.numel() for value in model.parameters()) == 38_316_896
    with torch.device("meta"):
        large = timm.create_model("clip_resnet101", img_size=(384, 128))
    assert large.attnpool.positional_embedding.shape == (1 + 24 * 8, 2048)
    assert large.attnpool.c_proj.weight.shape == (512, 2048)
    assert len(large.layer3) == 23
    with pytest.raises(RuntimeError, match="give a file of CLIP's authors"):
        timm.create_model("clip_resnet50", pretrained=True)


def test_the_attention_pool_is_torchs_own_attention():
    torch.manual_seed(0)
    pool, maps = clip_resnet.AttentionPool((3, 2), 128, 24), torch.randn(4, 128, 3, 2)
    for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        nn.init.normal_(layer.bias)
    places = maps.flatten(2).permute(2, 0, 1)
    x = torch.cat([places.mean(dim=0, keepdim=True), places]) + pool.positional_embedding[:, None]
    layers = [pool.q_proj, pool.k_proj, pool.v_proj]
    wanted, _ = F.multi_head_attention_forward(
        *(x[:1], x, x, 128, 2, None, torch.cat([layer.bias for layer in layers]), None, None, False, 0.0),
        *(pool.c_proj.weight, pool.c_proj.bias),
        use_separate_proj_weight=True,
        q_proj_weight=layers[0].weight,
        k_proj_weight=layers[1].weight,
        v_proj_weight=layers[2].weight,
    )
    torch.testing.assert_close(pool(maps), wanted[0], atol=1e-5, rtol=1e-4)


def test_a_block_with_stride_averages_before_it_projects():
    torch.manual_seed(0)
    block, maps = clip_resnet.ClipBlock(8, 4, 2).eval(), torch.randn(2, 8, 6, 4)
    inside = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(maps))))))
    inside = block.bn3(block.conv3(F.avg_pool2d(inside, 2)))
    beside = block.downsample[1](block.downsample[0](F.avg_pool2d(maps, 2)))
    torch.testing.assert_close(block(maps), F.relu(inside + beside))
    assert clip_resnet.ClipBlock(16, 4, 1).downsample is None


def test_positions_are_resized_bilinearly_and_the_mean_keeps_its_own():
    """A table that grows evenly down and across still does on another grid."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.cat([torch.tensor([[9.0, 9.0]]), torch.stack([rows, columns], dim=-1).flatten(0, 1)])
    found = clip_resnet.resized(table, (4, 4), (8, 2))
    assert found.shape == (17, 2)
    assert found[0].tolist() == [9, 9]
    down, across = found[1:].unflatten(0, (8, 2)).unbind(-1)
    torch.testing.assert_close(down[2:6, 0].diff(), torch.full((3,), 0.5))
    torch.testing.assert_close(across[0], torch.tensor([0.5, 2.5]))
    assert clip_resnet.resized(table, (4, 4), (4, 4)) is table


def test_square_weights_fit_tall_images():
    square, tall = resnet((64, 64)), resnet((96, 32))
    state = {f"visual.{name}": value.half() for name, value in square.state_dict().items()}
    state["logit_scale"] = torch.tensor(1.0)
    found = tall.from_clip(state, "FILE")
    assert found.keys() == tall.state_dict().keys()
    assert found["attnpool.positional_embedding"].shape == (1 + 6 * 2, 2048)
    tall.load_state_dict(found)
    images = torch.randn(2, 3, 96, 32)
    features = tall(images)
    assert features.shape == (2, 24)
    # the square network resizes its positions for the tall images by itself; half precision rounds them before
    torch.testing.assert_close(square(images), features, atol=0.02, rtol=0.05)
    with pytest.raises(UserError, match="FILE holds no ResNet of CLIP"):
        tall.from_clip({"token_embedding.weight": torch.zeros(2, 2)}, "FILE")


def test_it_is_a_backbone_with_maps_and_a_feature():
    arguments = backbones.arguments_of(BackboneConfig(name="clip_resnet50", drop_path=0.0), (64, 32))
    assert arguments == {"model_name": "clip_resnet50", "num_classes": 0, "img_size": [64, 32]}
    backbone = backbones.build({**arguments, "width": 64})
    assert (backbone.dim, backbone.grid) == (1024, (4, 2))
    with torch.no_grad():
        tokens = backbone.eval()(torch.randn(1, 3, 64, 32))
    assert tokens.cls.shape == (1, 1024)
    assert tokens.patches.shape == (1, 8, 2048)
    with pytest.raises(UserError, match="no multiples of 16"):
        backbones.build({**arguments, "img_size": [60, 32]})


def test_layers_are_told_for_a_rate_that_shrinks_with_depth():
    backbone = backbones.build({"model_name": "clip_resnet50", "num_classes": 0, "img_size": [64, 32]})
    found = levels(backbone)
    order = ["conv1.weight", "layer1.0.conv1.weight", "layer2.3.conv3.weight", "layer4.2.conv3.weight"]
    depths = [found[f"model.{name}"] for name in order]
    assert all(a > b for a, b in itertools.pairwise(depths)), depths
    assert found["model.attnpool.c_proj.weight"] == min(found.values())
