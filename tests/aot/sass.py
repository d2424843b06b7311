"""Finds the loop of a kernel's machine code where its exponentials are computed, and counts its instructions."""

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["instructions_per_exponential"]

LINE = re.compile(r"^(?P<label>\.\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<instruction>[^;]*?)\s*;", re.MULTILINE)
BRANCH = re.compile(r"\b(?:BRA|CALL\.REL\.NOINC)\b.*`\((\.\w+)\)")  # the latter is how ptxas jumps far
ALWAYS = re.compile(r"^(BRA(\.\w+)* `|EXIT$|RET\b|BRX\b)")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
MATRIX = re.compile(r"\b\w+MMA\b")  # HMMA, HGMMA, UTCHMMA, and not HFMA2.MMA


class Block(NamedTuple):
    """Instructions that run one after another, and the blocks that may follow them."""

    instructions: list[str]
    successors: set[int]


def instructions_per_exponential(sass: str) -> float | None:
    """Instructions of the hot loop of a warp over those of them that are MUFU.EX2; None where there is no such loop.

    The hot loop holds a matrix instruction and MUFU.EX2, and no smaller loop that does; of several, such as one for
    whole tiles and one for ragged edges, the one with the fewest instructions to an exponential. An inner loop over
    chunks of D counts once, however often it runs.

    Args:
        sass: what nvdisasm prints.
    """
    blocks = blocks_of(sass)
    hot = [loop for loop in loops_of(blocks) if count(MATRIX, blocks, loop) and count(EXPONENTIAL, blocks, loop)]
    innermost = [loop for loop in hot if not any(other < loop for other in hot)]
    ratios = [count(re.compile(""), blocks, loop) / count(EXPONENTIAL, blocks, loop) for loop in innermost]
    return min(ratios, default=None)


def count(pattern: re.Pattern[str], blocks: list[Block], loop: Iterable[int]) -> int:
    return sum(bool(pattern.search(instruction)) for i in loop for instruction in blocks[i].instructions)


def blocks_of(sass: str) -> list[Block]:
    """Basic blocks in the order of the listing; the first is the entry."""
    bodies, labels = [[]], {}
    for line in LINE.finditer(sass):
        if bodies[-1] and (line["label"] or BRANCH.search(bodies[-1][-1]) or ALWAYS.match(bodies[-1][-1])):
            bodies.append([])
        if line["label"]:
            labels[line["label"]] = len(bodies) - 1
        else:
            bodies[-1].append(line["instruction"])

    blocks = []
    for i, body in enumerate(bodies):
        last = body[-1] if body else ""
        branch = BRANCH.search(last)
        successors = {labels[branch[1]]} if branch else set()
        if not ALWAYS.match(last) and i + 1 < len(bodies):
            successors.add(i + 1)
        blocks.append(Block(body, successors))
    return blocks


def loops_of(blocks: list[Block]) -> list[set[int]]:
    """Natural loops: a block that a branch goes back to, and every block between the two.

    A jump backwards out of code that was merely moved to the end of the listing is none: the block that it goes to
    can be reached without passing through it the other way round.
    """
    before = [{j for j, block in enumerate(blocks) if i in block.successors} for i in range(len(blocks))]
    dominators = dominators_of(blocks, before)
    loops: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for header in block.successors & dominators[i]:
            body, pending = loops.setdefault(header, {header}), [i]
            while pending:
                if (j := pending.pop()) not in body:
                    body.add(j)
                    pending.extend(before[j])
    return list(loops.values())


def dominators_of(blocks: list[Block], before: list[set[int]]) -> list[set[int]]:
    """For each block those that lie on every way to it from the entry; empty where no way leads."""
    reached, pending = set(), [0]
    while pending:
        if (i := pending.pop()) not in reached:
            reached.add(i)
            pending.extend(blocks[i].successors)

    dominators = [set(reached) if i in reached else set() for i in range(len(blocks))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            found = {i} | set.intersection(*(dominators[j] for j in before[i] & reached))
            changed |= found != dominators[i]
            dominators[i] = found
    return dominators
