import hashlib
import re
import struct

import pytest
import torch
from torch import nn

from mmalign.cache import content_key, weights_fingerprint


def test_a_content_key_is_the_sha256_of_tags_lengths_and_contents() -> None:
    size = struct.Struct("<q").pack
    by_hand = (
        b"t" + size(4) + b"s" + size(2) + "\u00e9".encode() + b"i" + size(2) + b"-7"
        + b"f" + size(8) + struct.pack("<d", 0.5) + b"t" + size(1) + b"y" + size(3) + b"\x00\x01\x02"
    )  # fmt: skip
    assert content_key("\u00e9", -7, 0.5, (b"\x00\x01\x02",)) == hashlib.sha256(by_hand).hexdigest()


def test_different_contents_have_different_keys() -> None:
    contents = [
        (), ("",), (b"",), ((),), ("1",), (1,), (1.0,), (True,), (0,), (False,), (b"1",),
        ("ab", "c"), ("a", "bc"), ("abc",), (("a", "b"), "c"), ("a", ("b", "c")), (("a", "b", "c"),), (10**30,), (-1,),
    ]  # fmt: skip
    assert len({content_key(*content) for content in contents}) == len(contents)


def test_a_content_key_of_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got list, want bytes|Type-check error"):
        content_key("a", ([1],))  # type: ignore[arg-type]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_equal_weights_have_equal_fingerprints_whatever_their_memory_format() -> None:
    other = network().to(memory_format=torch.channels_last).requires_grad_(False)
    assert other[0].weight.stride() != network()[0].weight.stride()
    assert weights_fingerprint(other) == weights_fingerprint(network())
    assert re.fullmatch("[0-9a-f]{64}", weights_fingerprint(other))


def test_any_change_of_weights_buffers_dtypes_shapes_or_names_changes_the_fingerprint() -> None:
    one_bit, buffer, shape = network(), network(), network()
    one_bit[2].bias.data.view(torch.int32)[1] ^= 1
    buffer[1].running_mean[3] = 0.1
    shape[2].weight = nn.Parameter(shape[2].weight.detach().view(4, 2))
    renamed = nn.Sequential(*list(network()))
    renamed.add_module("last", renamed.pop(2))
    changed = [network(), network(seed=1), one_bit, buffer, shape, network().to(torch.bfloat16), renamed]
    assert len({weights_fingerprint(module) for module in changed}) == len(changed)


def test_the_last_byte_of_a_tensor_larger_than_one_chunk_counts() -> None:
    module = nn.Module()
    module.register_buffer("large", torch.zeros((1 << 26) + 5, dtype=torch.uint8))
    before = weights_fingerprint(module)
    module.large[-1] = 1
    assert weights_fingerprint(module) != before
