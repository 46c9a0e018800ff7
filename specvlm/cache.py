"""Key/value slabs: one allocation per device, sized to the videos in flight, rewound by a number.

A slab has a fixed number of slots for each row. Committed tokens stand in slots 0..length-1; what a round writes
behind them is either moved into place by `commit` or simply overwritten by the next round. Nothing is ever freed,
grown or copied while a video generates. It knows nothing of models but their key/value shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlabShape(NamedTuple):
    """What a model's layers store per token."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]  # [L], where each layer computes
    feature_width: int = 0  # of the features that are kept of each token, beside its keys and values; 0: none
    feature_device: torch.device | None = None


class Slabs:
    """The memory of a cache: for each device [L, 2, rows * capacity, kv heads, head_dim], of the layers there.

    Attributes:
        features: [rows * capacity, feature width], what else is kept of each token; None: nothing.
    """

    def __init__(self, shape: SlabShape, rows: int, capacity: int) -> None:
        """Allocate `rows` x `capacity` slots for every layer."""
        self.rows, self.capacity = rows, capacity
        self.name = object()  # of this memory, for those who must not keep it
        self.by_device: dict[torch.device, torch.Tensor] = {}
        for device in dict.fromkeys(shape.devices):
            count = shape.devices.count(device)
            size = (count, 2, rows * capacity, shape.kv_heads, shape.head_dim)
            self.by_device[device] = torch.zeros(size, dtype=shape.dtype, device=device)
        self.features: torch.Tensor | None = None
        if shape.feature_width:
            width = (rows * capacity, shape.feature_width)
            self.features = torch.zeros(width, dtype=shape.dtype, device=shape.feature_device)

    @torch.inference_mode()
    def clear(self) -> None:
        """Make it as new. A slot that nobody wrote may hold anything but NaN: masked, it still takes part in sums."""
        for slab in self.by_device.values():
            slab.zero_()
        if self.features is not None:
            self.features.zero_()


class _Aim:
    """Where the next forward writes, and how far it sees. Shared by all layers of a cache."""

    def __init__(self) -> None:
        self.slots = torch.empty(0, dtype=torch.long)  # [rows * n], flat: row * capacity + slot
        self.rows = slice(0, 0)
        self.visible = 0


class _SlabLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of its device's slab."""

    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: int, aim: _Aim) -> None:
        """`keys`, `values`: [rows * capacity, kv heads, head_dim], views of the slab."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self._rows, self._aim = rows, aim
        self.is_initialized = True

    def _write(self, slab: torch.Tensor, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Write states [b, kv heads, n, d] to flat slots; return [b, kv heads, visible, d], a view."""
        slab.index_copy_(0, slots, states.transpose(1, 2).reshape(-1, *slab.shape[1:]))
        by_row = slab.view(self._rows, -1, *slab.shape[1:])
        return by_row[self._aim.rows, : self._aim.visible].transpose(1, 2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [b, kv heads, n, d] where the cache was aimed; return all that this forward may see."""
        assert self.keys is not None
        assert self.values is not None
        slots = self._aim.slots.to(self.keys.device)
        return self._write(self.keys, key_states, slots), self._write(self.values, value_states, slots)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is lazy here."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that the next forward sees, and the first of them."""
        return self._aim.visible, 0

    def get_seq_length(self) -> int:
        """Slots before those that the next forward writes; masks and positions are ours, so only a nominal figure."""
        return self._aim.visible

    def get_max_length(self) -> int:
        """Slots of a row."""
        assert self.keys is not None
        return self.keys.shape[0] // self._rows

    get_max_cache_shape = get_max_length


class SlabCache(Cache):
    """Keys and values of B rows in slabs, for one job."""

    def __init__(
        self, shape: SlabShape, rows: int, capacity: int, slabs: Slabs | None = None, grain: int = 1
    ) -> None:
        """Lay `rows` x `capacity` slots out for every layer.

        Args:
            shape: What layers store.
            rows: B.
            capacity: What this very job needs: prompt + max_new_tokens + the slots of one round.
            slabs: Memory to use, of as many rows and at least as many slots; None allocates it.
            grain: Rounds are told lengths in steps of so many slots.
        """
        self._slabs = Slabs(shape, rows, capacity) if slabs is None else slabs
        self.rows, self.capacity = rows, self._slabs.capacity
        self.grain, self._aim = grain, _Aim()
        super().__init__(layers=self._make_layers(shape.devices))

    def _make_layers(self, devices: Sequence[torch.device]) -> list[Any]:
        taken = dict.fromkeys(devices, 0)
        layers = []
        for device in devices:
            keys, values = self._slabs.by_device[device][taken[device]]
            layers.append(_SlabLayer(keys, values, self.rows, self._aim))
            taken[device] += 1
        return layers

    @property
    def slabs(self) -> Slabs:
        """The memory."""
        return self._slabs

    @property
    def size_bytes(self) -> int:
        """Memory of all slabs."""
        slabs = [
            *self._slabs.by_device.values(),
            *([] if self._slabs.features is None else [self._slabs.features]),
        ]
        return sum(slab.numel() * slab.element_size() for slab in slabs)

    def flat(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots per row [B, n] -> flat slots [B * n]."""
        row = torch.arange(self.rows, device=slots.device)[:, None]
        return (row * self.capacity + slots).flatten()

    def aim_prefill(self, row: int, first: int, count: int, device: torch.device) -> None:
        """The next forward has one row, `row`, and writes slots first..first+count-1; it sees 0..first+count-1."""
        if first + count > self.capacity:
            raise ValueError(f"slab of {self.capacity} slots cannot hold {first + count} tokens")
        self._aim.slots = torch.arange(first, first + count, device=device) + row * self.capacity
        self._aim.rows = slice(row, row + 1)
        self._aim.visible = first + count

    def aim_nodes(self, slots: torch.Tensor, visible: int) -> None:
        """The next forward has all rows and writes slots [B, n]; it sees 0..visible-1 (under its own mask)."""
        self._aim.slots = self.flat(slots)
        self._aim.rows = slice(0, self.rows)
        assert visible <= self.capacity
        self._aim.visible = visible

    def keep_features(self, features: torch.Tensor) -> None:
        """Store the features [b, n, width] of the tokens that the last forward wrote, where this cache keeps any."""
        kept = self._slabs.features
        if kept is not None:
            kept.index_copy_(0, self._aim.slots.to(kept.device), features.flatten(0, 1).to(kept))

    def features(self, slots: torch.Tensor) -> torch.Tensor:
        """The features [B, n, width] at slots [B, n]."""
        kept = self._slabs.features
        assert kept is not None
        return kept.index_select(0, self.flat(slots)).view(*slots.shape, -1)

    def row_features(self, row: int, count: int) -> torch.Tensor:
        """The features [1, count, width] of a row's first tokens."""
        kept = self._slabs.features
        assert kept is not None
        return kept[row * self.capacity : row * self.capacity + count][None]

    def zero(self, slots: torch.Tensor) -> None:
        """Zero slots [B, n] in every layer; those beyond the capacity are none."""
        where = self.flat(slots.clamp(max=self.capacity - 1))
        for device, slab in self._slabs.by_device.items():
            slab.index_fill_(2, where.to(device), 0.0)
        if self._slabs.features is not None:
            self._slabs.features.index_fill_(0, where, 0.0)

    def commit(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Move slots source [B, n] to destination [B, n], in every layer, as if read all at once before writing."""
        source, destination = self.flat(source), self.flat(destination)
        for device, slab in self._slabs.by_device.items():
            moved = slab.index_select(2, source.to(device))
            slab.index_copy_(2, destination.to(device), moved)
        if (features := self._slabs.features) is not None:
            features.index_copy_(0, destination, features.index_select(0, source))
