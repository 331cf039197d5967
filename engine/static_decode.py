"""Decoding whose every step does the same work in the same memory, so that a GPU can record one and
replay it (CUDA graphs). `generate` launches thousands of kernels a token from Python, and a card is
faster than that. --static_decoding; the tokens are those of `generate`.

Not measured on a GPU: `python -m bench.gpu` does. A step reads the whole room for keys and values,
where `generate` reads what is filled.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engine.shared_prefix import TokenSampler


class StaticSteps:
    """The tokens of N completions, one step after another, from what `branches` holds.

    token [N, 1]: the last one that is known. at [1]: how many of a completion are there, the place
    of the next one in `branches` (whose layers share this tensor), `draws` and `said` [N, T].
    position [N, 1]: of `token` in the row. draws None: greedy.
    """

    def __init__(
        self,
        core: nn.Module,
        cache: dict[str, DynamicCache],  # by the name that transformers gives the argument
        sampler: TokenSampler,
        token: Tensor,
        position: Tensor,
        at: Tensor,
        draws: Tensor | None,
    ):
        self.core, self.cache, self.sampler = core, cache, sampler
        self.token, self.position, self.at, self.draws = token.clone(), position, at, draws
        (branches,) = cache.values()
        self.said = token.new_zeros(len(token), branches.layers[0].keys.shape[2])
        self.graph = None

    def run(self, start: int, stop: int) -> Tensor:
        """Tokens start, ..., stop - 1 of each [N, stop - start]."""
        if self.graph is None and self.token.is_cuda:
            self._record()
        for _ in range(start, stop):
            self.graph.replay() if self.graph else self._step()
        return self.said[:, start:stop]

    def _step(self) -> None:
        hidden = self.core.model(
            inputs_embeds=self.core.get_input_embeddings()(self.token),
            attention_mask={"full_attention": None},
            position_ids=self.position.expand(3, -1, -1),
            use_cache=True,
            **self.cache,
        ).last_hidden_state
        scores = self.core.lm_head(hidden[:, -1]).float()
        u = None if self.draws is None else self.draws.index_select(1, self.at)
        self.token.copy_(self.sampler.choose(scores, u))
        self.said.index_copy_(1, self.at, self.token)
        self.position += 1
        self.at += 1

    def _record(self) -> None:
        """Record a step, after one that lets libraries allocate what they need and is undone."""
        state = self.token, self.position, self.at
        before = [x.clone() for x in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        for x, was in zip(state, before):
            x.copy_(was)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
