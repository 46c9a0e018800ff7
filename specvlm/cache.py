"""Keys and values of the sequences in flight, in slabs: rows of slots that are written, committed and rewound.

A slab holds sequences that need about the same number of slots, so memory follows the tokens in flight: one long video
does not make short ones pay for its length. A sequence's committed tokens are in slots 0..length-1 of its row. What a
round writes after them is either moved into place by `commit` or overwritten by the next round. The rows in use are
always the first ones of a slab: when a sequence goes, the last one takes its row. It knows nothing of models but the
shapes of their keys and values.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_SMALLEST = 64  # slots of a row
_SPARE_BYTES = 64 << 20  # of rows that are allocated before they are needed
_NUMBERS = count()


class SlabShape(NamedTuple):
    """What a model's layers store per token."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]  # [L], where each layer computes
    feature_width: int = (
        0  # of the features that are kept of each token, besides its keys and values; 0: none
    )
    feature_device: torch.device | None = None

    @property
    def slot_bytes(self) -> int:
        """Memory of one token."""
        numbers = len(self.devices) * 2 * self.kv_heads * self.head_dim + self.feature_width
        return numbers * self.dtype.itemsize


def rounded(slots: int) -> int:
    """The capacity of the row of a sequence that needs so many slots: at most a quarter more."""
    step = max(_SMALLEST, 1 << max(0, (slots - 1).bit_length() - 3))
    return -(-slots // step) * step


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU, of memory that the system hands out as it is written to."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    memory = np.zeros(math.prod(size) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(size)


def _by_row(part: torch.Tensor, rows: int) -> torch.Tensor:
    """[L, 2, rows * capacity, kv heads, head_dim] -> [L, 2, rows, capacity, kv heads, head_dim]."""
    return part.view(*part.shape[:2], rows, -1, *part.shape[3:])


class Slab:
    """Rows of slots: for each device [L there, 2, rows * capacity, kv heads, head_dim].

    Attributes:
        number: Of this slab; no other ever has it.
        taken: Rows in use, the first ones.
        features: [rows * capacity, feature width], what else is kept of each token; None: nothing.
    """

    def __init__(self, shape: SlabShape, rows: int, capacity: int) -> None:
        """Allocate `rows` x `capacity` slots for every layer.

        Slots that were never written hold zeros: masked, a slot still takes part in sums, so it may not hold NaN.
        """
        self.number = next(_NUMBERS)
        self.rows, self.capacity, self.taken = rows, capacity, 0
        self._written = 0  # rows that a sequence has had, the first ones
        self._by_device: dict[torch.device, torch.Tensor] = {}
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for device in dict.fromkeys(shape.devices):
            size = (
                shape.devices.count(device),
                2,
                rows * capacity,
                shape.kv_heads,
                shape.head_dim,
            )
            self._by_device[device] = _zeros(size, shape.dtype, device)
        seen: Counter[torch.device] = Counter()
        for device in shape.devices:
            keys, values = self._by_device[device][seen[device]]
            self._layers.append((keys, values))
            seen[device] += 1
        self.features: torch.Tensor | None = None
        if shape.feature_width:
            width = (rows * capacity, shape.feature_width)
            self.features = torch.zeros(width, dtype=shape.dtype, device=shape.feature_device)

    @property
    def size_bytes(self) -> int:
        """Memory of all slots."""
        return sum(part.numel() * part.element_size() for part, _ in self.parts())

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [rows * capacity, kv heads, head_dim]."""
        return self._layers[index]

    def seen(self, rows: slice, visible: int) -> list[tuple[torch.Tensor, ...]]:
        """The first slots of some rows: for each layer, keys and values [rows, kv heads, visible, head_dim]."""
        by_device = {
            device: iter(_by_row(part, self.rows)[:, :, rows, :visible].transpose(3, 4).unbind())
            for device, part in self._by_device.items()
        }
        return [next(by_device[keys.device]).unbind() for keys, _ in self._layers]

    def parts(self) -> Iterator[tuple[torch.Tensor, int]]:
        """All tensors, and which of their dimensions counts the slots."""
        for part in self._by_device.values():
            yield part, 2
        if self.features is not None:
            yield self.features, 0

    def row(self, row: int, slots: int | None = None) -> list[torch.Tensor]:
        """Views of a row, or of its first slots, in the order of `parts`."""
        count = self.capacity if slots is None else slots
        return [part.narrow(at, row * self.capacity, count) for part, at in self.parts()]

    def take(self) -> int:
        """The next free row, for a sequence; its slots are zeros."""
        row = self.taken
        self.taken += 1
        if row < self._written:
            for part in self.row(row):
                part.zero_()
        self._written = max(self._written, self.taken)
        return row

    def write(self, row: int, parts: Sequence[torch.Tensor]) -> None:
        """Copy what `row` gave of a row, here or in another slab of the same model, to the beginning of a row."""
        at = [dimension for _, dimension in self.parts()]
        slots = parts[0].shape[at[0]]
        for here, there in zip(self.row(row, slots), parts, strict=True):
            here.copy_(there)


class _Place(NamedTuple):
    """Where a sequence is."""

    slab: Slab
    row: int


class SlabRows(NamedTuple):
    """The rows of the batch that one slab holds, in the order in which it holds them."""

    slab: Slab
    rows: tuple[int, ...]  # rows of the batch; the slab's rows follow each other
    # The same, to index a tensor of the batch with: a slice where they follow each other, else int64 [rows].
    where: slice | torch.Tensor
    first: int = 0  # the slab's row that holds the first of them

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The group's rows of a tensor [B, ...]."""
        return tensor[self.where]


@dataclass(frozen=True)
class Tables:
    """How rows are found at one moment: tensors, and the slabs, which are not kept for it.

    Attributes:
        tensors: They say where rows are.
    """

    tensors: list[torch.Tensor]
    _slabs: list[weakref.ref[Slab]]

    @property
    def valid(self) -> bool:
        """Whether all slabs are still there."""
        return all(slab() is not None for slab in self._slabs)


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Tokens of one sequence in a prefill: `count` of them after `first` slots of a row of the batch."""

    row: int
    first: int
    count: int


class _Write(NamedTuple):
    """What a forward writes to one slab."""

    slab: Slab
    slots: torch.Tensor  # int64 [tokens], flat slots in the slab
    tokens: torch.Tensor | None  # int64 [tokens], which of the forward's tokens; None: all, in order

    def on(self, device: torch.device) -> _Write:
        """For layers on a device."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return _Write(self.slab, self.slots.to(device), tokens)


class _Aim:
    """Where the next forward writes, and what it sees. Shared by all layers of a cache.

    Attributes:
        writes: What it writes, for layers on each device.
        seen: What each layer sees: keys and values of each read; None: what it writes.
        visible: The most slots of any row.
    """

    def __init__(self) -> None:
        self.writes: dict[torch.device, list[_Write]] = {}
        self.seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None
        self.visible = 0

    def at(
        self,
        devices: Sequence[torch.device],
        writes: Sequence[_Write],
        reads: Sequence[tuple[Slab, slice, int]] | None,
    ) -> None:
        """Aim at slots to write, and at first slots of rows to see; `devices`: of the layers."""
        self.writes = {device: [write.on(device) for write in writes] for device in dict.fromkeys(devices)}
        self.seen = None
        if reads is not None:
            by_read = [slab.seen(rows, visible) for slab, rows, visible in reads]
            self.seen = [
                ([one[0] for one in layer], [one[1] for one in layer]) for layer in zip(*by_read, strict=True)
            ]
            self.visible = max(visible for _, _, visible in reads)


class _SlabLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of all slabs."""

    is_compileable = True

    def __init__(self, index: int, device: torch.device, aim: _Aim) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._index, self._device, self._aim = index, device, aim
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Store [b, kv heads, n, d] where the cache was aimed.

        Returns:
            Keys and values that this forward may see, each a list of [rows, kv heads, visible, d]: one tensor for
            each group of rows, or for each part of a prefill. Only this library's attention takes lists.
        """
        keys, values = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        for slab, slots, tokens in self._aim.writes[self._device]:
            kept_keys, kept_values = slab.layer(self._index)
            kept_keys.index_copy_(0, slots, keys if tokens is None else keys.index_select(0, tokens))
            kept_values.index_copy_(0, slots, values if tokens is None else values.index_select(0, tokens))
        if self._aim.seen is None:
            return [key_states], [value_states]
        return self._aim.seen[self._index]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is lazy here."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that the next forward sees, and the first of them."""
        return self._aim.visible, 0

    def get_seq_length(self) -> int:
        """A nominal figure: masks and positions are ours."""
        return self._aim.visible

    def get_max_length(self) -> int:
        """A nominal figure."""
        return self._aim.visible

    get_max_cache_shape = get_max_length


class KVCache(Cache):
    """Keys and values of a batch of sequences, of one model.

    Rows of the batch are numbered 0..B-1 by the caller: `add` adds rows at the end, `keep` drops and reorders them.
    Which slab holds a row is this class's own business.
    """

    def __init__(self, shape: SlabShape, device: torch.device) -> None:
        """No rows yet. `device`: where the slots of rounds are worked out."""
        self._shape, self._device, self._aim = shape, device, _Aim()
        self._slabs: list[Slab] = []
        self._places: list[_Place] = []
        self._groups: list[SlabRows] = []
        self.base = torch.zeros(0, dtype=torch.long, device=device)
        super().__init__(
            layers=[_SlabLayer(index, device, self._aim) for index, device in enumerate(shape.devices)]
        )

    # --- rows ---

    @property
    def rows(self) -> int:
        """B."""
        return len(self._places)

    @property
    def groups(self) -> Sequence[SlabRows]:
        """The rows by slab."""
        return self._groups

    @property
    def layout(self) -> Hashable:
        """Which slab holds which rows; while it is the same, so are the addresses of all slots."""
        return tuple((group.slab.number, group.rows) for group in self._groups)

    @property
    def tables(self) -> Tables:
        """What forwards read to find the rows; it is the same for a layout."""
        where = [group.where for group in self._groups if isinstance(group.where, torch.Tensor)]
        return Tables([self.base, *where], [weakref.ref(group.slab) for group in self._groups])

    @property
    def size_bytes(self) -> int:
        """Memory of all slabs."""
        return sum(slab.size_bytes for slab in self._slabs)

    @torch.inference_mode()
    def add(self, slots: Sequence[int], most_rows: int = 0) -> None:
        """Add rows at the end of the batch.

        Args:
            slots: What each of the new sequences needs: prompt, caption, and the nodes of a round.
            most_rows: The most rows that the batch is going to have; where memory is cheap, room for further rows of
                a kind is allocated together with the first ones.
        """
        capacities = [rounded(count) for count in slots]
        spare = max(0, most_rows - self.rows - len(slots))
        wanted = Counter(capacities)
        for capacity in wanted:
            self._make_room(capacity, wanted, spare)
        for capacity in capacities:
            slab = next(s for s in self._slabs if s.capacity == capacity and s.taken < s.rows)
            self._places.append(_Place(slab, slab.take()))
        self._regroup()

    def _make_room(self, capacity: int, wanted: Mapping[int, int], spare: int) -> None:
        """Have free rows of a capacity for all that want one; slabs that nothing uses or needs are freed."""
        here = [slab for slab in self._slabs if slab.capacity == capacity]
        lacking = wanted[capacity] - sum(slab.rows - slab.taken for slab in here)
        if lacking <= 0:
            return
        self._slabs = [slab for slab in self._slabs if slab.taken or slab.capacity in wanted]
        taken = sum(slab.taken for slab in here)
        affordable = _SPARE_BYTES // (capacity * self._shape.slot_bytes)
        rows = lacking + min(spare, taken, affordable)
        self._slabs.append(Slab(self._shape, rows, capacity))
        self._slabs.sort(
            key=lambda slab: (slab.capacity, -slab.rows)
        )  # rows move from small slabs to large ones

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """From now on, the batch is these of its rows, in this order."""
        kept = set(rows)
        at = {(place.slab.number, place.row): row for row, place in enumerate(self._places)}
        order = {slab.number: number for number, slab in enumerate(self._slabs)}
        dropped = [place for row, place in enumerate(self._places) if row not in kept]
        for hole in sorted(dropped, key=lambda place: (order[place.slab.number], place.row), reverse=True):
            last = next(s for s in reversed(self._slabs) if s.capacity == hole.slab.capacity and s.taken)
            last.taken -= 1
            if (last, last.taken) != hole:
                hole.slab.write(hole.row, last.row(last.taken))
                moved = at.pop((last.number, last.taken))
                self._places[moved] = hole
                at[hole.slab.number, hole.row] = moved
        self._places = [self._places[row] for row in rows]
        self._regroup()

    def alone(self, row: int) -> KVCache:
        """A row as a cache of its own, over the same memory; good until rows are added or kept."""
        cache = KVCache(self._shape, self._device)
        cache._slabs, cache._places = [self._places[row].slab], [self._places[row]]
        cache._regroup()
        return cache

    def in_order(self) -> list[int]:
        """The rows of the batch in the order in which slabs hold them: after `keep` of it, groups are slices."""
        number = {slab.number: index for index, slab in enumerate(self._slabs)}
        return sorted(
            range(self.rows), key=lambda row: (number[self._places[row].slab.number], self._places[row].row)
        )

    def release(self) -> None:
        """Give back the memory of slabs without a sequence."""
        self._slabs = [slab for slab in self._slabs if slab.taken]

    def _regroup(self) -> None:
        found: dict[int, list[tuple[int, int]]] = {}
        for row, place in enumerate(self._places):
            found.setdefault(place.slab.number, []).append((place.row, row))
        self._groups = []
        for slab in self._slabs:
            if not slab.taken:
                continue
            rows = tuple(row for _, row in sorted(found[slab.number]))
            first = rows[0]
            where: slice | torch.Tensor = slice(first, first + len(rows))
            if rows != tuple(range(first, first + len(rows))):
                where = torch.tensor(rows, device=self._device)
            self._groups.append(SlabRows(slab, rows, where, self._places[first].row))
        base = [place.row * place.slab.capacity for place in self._places]
        self.base = torch.tensor(base, dtype=torch.long, device=self._device)

    # --- forwards ---

    def aim_prefill(self, parts: Sequence[PrefillPart], device: torch.device) -> None:
        """The next forward reads parts of sequences, one after the other in one row; each sees its own row alone.

        Raises:
            ValueError: A row has fewer slots.
        """
        writes: dict[int, tuple[Slab, list[torch.Tensor], list[torch.Tensor]]] = {}
        done = 0
        for part in parts:
            slab, row = self._places[part.row]
            if part.first + part.count > slab.capacity:
                raise ValueError(
                    f"a row of {slab.capacity} slots cannot hold {part.first + part.count} tokens"
                )
            _, slots, tokens = writes.setdefault(slab.number, (slab, [], []))
            start = row * slab.capacity + part.first
            slots.append(torch.arange(start, start + part.count, device=device))
            tokens.append(torch.arange(done, done + part.count, device=device))
            done += part.count
        found = [
            _Write(slab, torch.cat(slots), torch.cat(tokens) if len(writes) > 1 else None)
            for slab, slots, tokens in writes.values()
        ]
        reads = None
        if any(part.first for part in parts):
            places = [self._places[part.row] for part in parts]
            reads = [
                (place.slab, slice(place.row, place.row + 1), part.first + part.count)
                for place, part in zip(places, parts, strict=True)
            ]
        self._aim.at(self._shape.devices, found, reads)

    def aim_nodes(self, slots: torch.Tensor, reads: Sequence[tuple[Slab, slice, int]]) -> None:
        """The next forward has all rows and writes slots [B, n].

        `reads`: what it sees: rows of a slab, and how many of their first slots.
        """
        writes = [
            _Write(group.slab, self._flat(group, slots), self._tokens(group, slots.shape[1]))
            for group in self._groups
        ]
        self._aim.at(self._shape.devices, writes, reads)

    def _flat(self, group: SlabRows, slots: torch.Tensor) -> torch.Tensor:
        """Slots [B, n] of all rows -> flat slots of the group's in its slab, [rows * n]."""
        return (group.of(self.base)[:, None] + group.of(slots)).flatten()

    def _tokens(self, group: SlabRows, count: int) -> torch.Tensor | None:
        """Which tokens of [B * n] are the group's; None: all."""
        if len(self._groups) == 1 and isinstance(group.where, slice):
            return None
        row = torch.arange(self.rows, device=self._device)[group.where]
        return (row[:, None] * count + torch.arange(count, device=self._device)).flatten()

    def commit(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Move slots source [B, n] to destination [B, n], in every layer, as if read all at once before writing."""
        for group in self._groups:
            read, write = self._flat(group, source), self._flat(group, destination)
            for part, at in group.slab.parts():
                moved = part.index_select(at, read.to(part.device))
                part.index_copy_(at, write.to(part.device), moved)

    def zero(self, slots: torch.Tensor) -> None:
        """Zero slots [B, n] in every layer; those beyond a row's capacity are ignored."""
        for group in self._groups:
            where = self._flat(group, slots.clamp(max=group.slab.capacity - 1))
            for part, at in group.slab.parts():
                part.index_fill_(at, where.to(part.device), 0.0)

    # --- what is kept of tokens ---

    def keep_features(self, features: torch.Tensor) -> None:
        """Store the features [b, n, width] of the tokens that the last forward wrote, where any are kept."""
        if not self._shape.feature_width:
            return
        flat = features.flatten(0, 1)
        for slab, slots, tokens in next(iter(self._aim.writes.values())):
            assert slab.features is not None
            device = slab.features.device
            mine = flat if tokens is None else flat.index_select(0, tokens.to(flat.device))
            slab.features.index_copy_(0, slots.to(device), mine.to(slab.features))

    def features(self, slots: torch.Tensor) -> torch.Tensor:
        """The features [B, n, width] at slots [B, n]."""
        found = [self._group_features(group, slots) for group in self._groups]
        if len(found) == 1 and isinstance(self._groups[0].where, slice):
            return found[0]
        out = found[0].new_empty(*slots.shape, found[0].shape[-1])
        for group, features in zip(self._groups, found, strict=True):
            out[group.where] = features
        return out

    def _group_features(self, group: SlabRows, slots: torch.Tensor) -> torch.Tensor:
        kept = group.slab.features
        assert kept is not None
        return kept.index_select(0, self._flat(group, slots)).view(len(group.rows), slots.shape[1], -1)

    def row_features(self, row: int, count: int) -> torch.Tensor:
        """The features [1, count, width] of a row's first tokens."""
        slab, at = self._places[row]
        assert slab.features is not None
        return slab.features[at * slab.capacity : at * slab.capacity + count][None]

    @torch.inference_mode()
    def copy_out(self, row: int, count: int) -> list[torch.Tensor]:
        """A copy of the first slots of a row, for `copy_in`."""
        slab, at = self._places[row]
        return [part.clone() for part in slab.row(at, count)]

    @torch.inference_mode()
    def copy_in(self, row: int, parts: Sequence[torch.Tensor]) -> None:
        """Write what `copy_out` gave to the first slots of a row."""
        slab, at = self._places[row]
        slab.write(at, parts)
