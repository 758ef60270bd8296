"""The knowledge tree in its plainest form: a dictionary of paths, searched through each time."""

from itertools import accumulate
from types import SimpleNamespace

from sim.state.knowledge_tree import MoveKind

GPU, HOST = "gpu", "host"


class PlainTree:
    """What `KnowledgePrefixes` does, with every count taken anew from the nodes."""

    def __init__(self, rule, block, lengths, *, system, host_blocks, replicate_from, cost_s):
        self.rule, self.block, self.lengths, self.system = rule, block, lengths, system
        self.host_blocks, self.replicate_from, self.cost_s = host_blocks, replicate_from, cost_s
        self.nodes, self.held, self.moves = {}, {}, []
        self.used, self.stored = set(), set()
        self.clock = {GPU: 0.0, HOST: 0.0}
        self.uses = 0

    def paths(self, documents):
        whole = (-1, *documents) if self.system else documents
        return [whole[: at + 1] for at in range(len(whole))]

    def node(self, path):
        if path not in self.nodes:
            lengths = [self.system if one < 0 else self.lengths[one] for one in path]
            ends = [0, *[end // self.block for end in accumulate(lengths)]]
            self.nodes[path] = SimpleNamespace(
                path=path, number=len(self.nodes) + 1, blocks=ends[-1] - ends[-2], gpu=False,
                host=False, last=0, uses=0, frequency=0, costs=[], worth={GPU: 0.0, HOST: 0.0},
            )  # fmt: skip
        return self.nodes[path]

    def children(self, node):
        return [one for one in self.nodes.values() if one.path[:-1] == node.path]

    def pins(self, node):
        return sum(node.path in paths for paths in self.held.values())

    def total(self, of):
        return sum(node.blocks for node in self.nodes.values() if of(node))

    @property
    def unheld(self):
        return self.total(lambda node: node.gpu and not self.pins(node))

    def value(self, node, tier):
        mean_s = sum(node.costs) / len(node.costs) if node.costs else 0.0
        node.worth[tier] = {
            "lru": node.last,
            "lfu": node.uses,
            "gdsf": self.clock[tier] + node.frequency,
            "pgdsf": self.clock[tier] + node.frequency * mean_s,
        }[self.rule]

    def move(self, kind, node):
        self.moves.append((kind, node.number, node.path[-1], node.blocks))

    def cached(self, documents):
        found = []
        for path in self.paths(documents):
            if path not in self.nodes or not (self.nodes[path].gpu or self.nodes[path].host):
                break
            found.append(self.nodes[path])
        return found

    def hold(self, request, documents, prefill_tokens):
        found = self.cached(documents)
        for node in found:
            if not node.gpu:
                node.gpu = True
                self.value(node, GPU)
                self.move(MoveKind.load, node)
        self.held[request] = [node.path for node in found]
        if request in self.used:
            return
        self.used.add(request)
        for node in found:
            node.uses += 1
            self.count(node)
        before = self.block * sum(node.blocks for node in found)
        new = prefill_tokens - before
        for path in self.paths(documents)[len(found) :]:
            node = self.node(path)
            node.uses = 1
            node.costs.append(self.cost_s(before, new) / new)
            self.count(node)

    def count(self, node):
        self.uses += 1
        node.last = self.uses
        node.frequency += 1
        for tier in (GPU, HOST):
            if getattr(node, tier):
                self.value(node, tier)

    def keep_copy(self, node):
        documents = [one for one in node.path if one >= 0]
        first = len(documents) <= 1 and (len(node.path) == 1 or self.nodes[node.path[:-1]].host)
        hot = self.replicate_from is not None and node.frequency >= self.replicate_from
        if first and hot and node.gpu and not node.host and self.make_room(node.blocks):
            node.host = True
            self.value(node, HOST)
            self.move(MoveKind.replicate, node)

    def store(self, request, documents, tokens):
        """Returns blocks of copies that another has stored, and of these those without holder."""
        held, copies, taken, end = self.held[request], 0, 0, 0
        for path in self.paths(documents):
            node = self.node(path) if path in self.nodes or path not in held else None
            assert node is not None
            end += node.blocks
            if path in held:
                continue
            if end > tokens // self.block:
                break
            if node.gpu:
                copies += node.blocks
                taken += 0 if self.pins(node) else node.blocks
            else:
                node.gpu = True
                self.value(node, GPU)
                self.move(MoveKind.insert, node)
            held.append(path)
        if request not in self.stored:
            for path in held:
                self.keep_copy(self.nodes[path])
        self.stored.add(request)
        return copies, taken

    def release(self, request):
        before = self.unheld
        del self.held[request]
        return self.unheld - before

    def lowest(self, tier):
        def leaves(node):
            if tier == GPU:
                return node.gpu and not any(one.gpu for one in self.children(node))
            below = any(one.gpu or one.host for one in self.children(node))
            return node.host and not node.gpu and not below

        some = [one for one in self.nodes.values() if leaves(one) and not self.pins(one)]
        node = min(some, key=lambda one: (one.worth[tier], one.last))
        if self.rule in {"gdsf", "pgdsf"}:
            self.clock[tier] = max(self.clock[tier], node.worth[tier])
        return node

    def make_room(self, blocks):
        if blocks + self.total(lambda one: one.host and one.gpu) > self.host_blocks:
            return False
        while self.total(lambda one: one.host) + blocks > self.host_blocks:
            self.forget(self.lowest(HOST))
        return True

    def forget(self, node):
        node.host = False
        self.move(MoveKind.forget, node)

    def shrink(self, room):
        while self.unheld > room:
            node = self.lowest(GPU)
            kept = node.host or self.make_room(node.blocks)
            node.gpu = False
            self.move(MoveKind.drop if node.host or not kept else MoveKind.swap_out, node)
            if kept and not node.host:
                node.host = True
                self.value(node, HOST)
            if not kept:
                self.forget_unreachable()

    def lose_gpu(self):
        for node in self.nodes.values():
            if node.gpu:
                node.gpu = False
                self.move(MoveKind.drop, node)
        self.forget_unreachable()

    def forget_unreachable(self):
        for node in sorted(self.nodes.values(), key=lambda one: len(one.path)):
            above = self.nodes.get(node.path[:-1])
            if node.host and above is not None and not (above.gpu or above.host):
                self.forget(node)
