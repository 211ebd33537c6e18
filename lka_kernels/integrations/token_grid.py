"""How a transformer block learns the shape of the token grid it is given."""

from __future__ import annotations

import torch


class TokenGrid:
    """The (height, width) in tokens of the images in the forward pass under way.

    A block sees tokens (B, P+N, C), from which height and width cannot be told apart. One
    ``TokenGrid`` is shared by a transformer's patch embedding, which writes it in a forward
    pre-hook (``record``), and by its blocks, which read it (``of``). It follows whatever size the
    input has, holds plain numbers, and is copied and pickled with the model.

    Gradient checkpointing calls the blocks a second time during the backward pass, when the
    patch embedding may have seen other images since. The sizes recorded since the last backward
    pass are therefore kept, and the one with the right number of tokens is taken; where two of
    them have it (14×10 and 10×14, say), that is an error rather than a guess.

    Args:
        size: the grid before the first forward pass.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = tuple(size)
        self._since_backward = [self.size]
        self._backward_seen = True

    def record(self, patch_embed, args) -> None:
        """Forward pre-hook of the patch embedding: note the grid of the images ``args[0]``."""
        height, width = args[0].shape[-2:]
        self.size = patch_embed.dynamic_feat_size((height, width))
        # A compiled graph holds its own recomputation, with the sizes it was traced with.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._backward_seen:
            self._since_backward, self._backward_seen = [], False
        if self.size not in self._since_backward:
            self._since_backward.append(self.size)

    def of(self, num_tokens: int) -> tuple[int, int]:
        """The grid of a block's input with ``num_tokens`` tokens beside the prefix tokens.

        Raises:
            RuntimeError: no recorded grid has this many tokens, or, in recomputation, several.
        """
        height, width = self.size
        if not torch.compiler.is_compiling() and _inside_backward():
            self._backward_seen = True
            fitting = [(h, w) for h, w in self._since_backward if h * w == num_tokens]
            if len(fitting) > 1:
                raise RuntimeError(
                    f"gradient checkpointing recomputes a block on {num_tokens} tokens, and "
                    f"forward passes with grids {fitting} precede this backward pass: run the "
                    "backward pass of each image shape before the next forward pass"
                )
            if fitting:
                return fitting[0]
        if height * width != num_tokens:
            raise RuntimeError(
                f"the block's input has {num_tokens} grid tokens, but the patch embedding last "
                f"saw images of {height}×{width} tokens: adapters need every patch of the image "
                "(no dropped, merged or masked-out tokens)"
            )
        return height, width


def _inside_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (-1 means no graph task)."""
    return torch._C._current_graph_task_id() != -1
