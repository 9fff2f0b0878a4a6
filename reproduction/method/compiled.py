"""A meta-gradient whose calls of hypergrad are compiled, with the same bits however a run began."""

import hypergrad
from reproduction.method.episodes import Episodes, Params
from reproduction.method.recorded import Found, MetaGradient


class CompiledMetaGradient:
    """A meta-gradient by `hypergrad.compile`.

    The call that makes a program returns what the library computes without it, which is another
    rounding than that of the program. A run that goes on from a checkpoint makes its programs at
    other meta-steps than one that was never stopped. So such a call is made again, by the program.

    Parameters
    ----------
    compute
        ``compute(params, episodes)``.
    """

    def __init__(self, compute: MetaGradient) -> None:
        self._compute = hypergrad.compile(compute)

    def __call__(self, params: Params, episodes: Episodes) -> Found:
        """Return gradient and measures.

        Parameters
        ----------
        params, episodes
            As `compute` takes them.

        Returns
        -------
        gradient : Params
            As `compute` returns it.
        measures : dict of Tensor
            As `compute` returns them.
        """
        session = self._compute.session
        known = len(session.programs)
        found: Found = self._compute(params, episodes)
        if len(session.programs) > known:
            found = self._compute(params, episodes)
        return found
