"""Recording caches: they answer as the caller's cache does, some tokens later, and store nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.length import CacheLength
from fhopt.decode.recording_cache import RecordingCaches, cached_tokens, is_cache, is_mask

TOKENS = 7


class UpdateRecorder:
    """What a recording cache needs of a recorder."""

    def __init__(self) -> None:
        self.guards: list[Any] = []
        self.written: list[int] = []

    def updated(self, keys: Any, values: Any, layer: int) -> Any:
        self.written.append(layer)
        return keys, values


def cache_of_two_layers() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 2, TOKENS, 4), torch.randn(1, 2, TOKENS, 4), layer)
    return cache


def recording(cache: Any, offset: int, **kwargs: Any) -> tuple[Any, dict[str, Any], UpdateRecorder]:
    caches, recorder = RecordingCaches(offset), UpdateRecorder()
    caches.recorder = recorder
    _, made = caches.replaced((), {"cache": cache, **kwargs})
    assert caches.is_stand_in(made["cache"]) and not caches.is_stand_in(cache)
    return made["cache"], made, recorder


@pytest.mark.parametrize("offset", [0, 5])
def test_the_length_is_later_and_nothing_is_stored(offset: int) -> None:
    cache = cache_of_two_layers()
    made, _, recorder = recording(cache, offset)
    assert isinstance(made, DynamicCache) and is_cache(made)
    length = made.get_seq_length()
    assert isinstance(length, CacheLength) and int(length) == TOKENS + offset
    assert made.get_mask_sizes(1, 1)[0] == TOKENS + offset + 1
    key = torch.randn(1, 2, 1, 4)
    assert made.update(key, key, 1)[0] is key and recorder.written == [1]
    assert cached_tokens(cache) == TOKENS


def test_masks_are_lengthened_and_others_are_not() -> None:
    mask, ids = torch.ones(1, TOKENS + 1), torch.zeros(1, 1, dtype=torch.long)
    mask[0, :2] = 0
    _, made, _ = recording(cache_of_two_layers(), 5, mask=mask, ids=ids, masks={"full": mask})
    assert made["mask"].shape == (1, TOKENS + 6) and made["mask"][0, :2].sum() == 0 and made["ids"] is ids
    assert made["masks"]["full"].shape == (1, TOKENS + 6)
    assert is_mask(mask, TOKENS) and not is_mask(ids, TOKENS)


def test_a_write_to_a_layer_is_refused() -> None:
    made, _, _ = recording(cache_of_two_layers(), 0)
    key = torch.randn(1, 2, 1, 4)
    with pytest.raises(UnsupportedError, match="without its cache"):
        made.layers[0].update(key, key)
