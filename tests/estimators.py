"""Estimators that other papers use, in the frame of this project: a view and one of our losses.

They score states that the sampler did not visit, so they are biased where the model's conditionals
do not agree with one distribution (tests/test_sepo.py measures how much).
"""
import torch

from diffusion import View


def noised_view(process, model, tokens, given):
    """x_t ~ q(. | x0) at a random number of masks, all masked slots scored -> View: the likelihood
    bound (ELBO) of finished samples [B, L] in place of their paths."""
    x, t, masked, weight = process.mask_some(tokens, given)
    return finished(process, model, tokens, x, t, masked, weight)


def terminal_view(process, model, tokens, given):
    """The sample with one random free slot masked again (t -> 0): its pseudo-likelihood."""
    u = torch.rand(tokens.shape).masked_fill(given, -1)
    masked = u == u.amax(dim=1, keepdim=True)
    x = torch.where(masked, process.mask, tokens)
    n = (~given).sum(dim=1)
    return finished(process, model, tokens, x, torch.zeros(len(x)), masked, n)


def finished(process, model, tokens, x, t, scored, weight):
    """A View of one state x per sample, with logp_old under `model`."""
    row, share = torch.arange(len(x)), torch.full((len(x),), 1 / len(x))
    view = View(row, None, x, t, None, None, tokens, scored, None, weight * share, share)
    with torch.no_grad():
        view.logp_old = process.logp(model, view)
    return view


def consistency(process, model, view):
    """The bound of the model's own samples, which holds it tight (DiPOD, 2606.13795) -> scalar, to
    be minimized beside the loss."""
    logp = process.logp(model, view)
    return -(view.weight[:, None] * view.scored * logp).sum()
