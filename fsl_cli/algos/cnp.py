"""Conditional Neural Processes, Garnelo et al., 2018 (https://arxiv.org/abs/1807.01613).

One network encodes the support items, the mean of the codes represents the episode, and a second network answers queries from
it. As in the paper, classification concatenates the mean codes of the classes, in the order of the class slots; regression
encodes pairs of input and value and takes the mean of all codes. In regression the paper predicts a Gaussian and maximises its
likelihood; here the network predicts only the mean, trained by squared error. Unlike the paper, embeddings are standardised by
the support set (`standardise`).
"""

import torch
from torch import Tensor, nn

from fsl_cli.algos.base import PLAIN_NORMS, Algorithm, Predictor, check_way
from fsl_cli.algos.heads import centroids, scaling
from fsl_cli.algos.limits import at_least
from fsl_cli.episodes import Examples
from fsl_cli.models.embedding import Embedding


class CNP(Algorithm):
    """Answers a query from its embedding and the mean codes of the support set."""

    bulk = True
    regresses = True
    norms = PLAIN_NORMS

    def __init__(
        self, model: Embedding, way: int, hidden: int, code: int, standardise: bool = False, regression: bool = False
    ) -> None:
        super().__init__(regression)
        at_least(1, hidden=hidden, code=code)
        self.standardise = standardise and not regression
        self.model = model
        self.encoder = _network(model.out_features + (way if regression else 0), hidden, code)
        self.decoder = _network(model.out_features + (1 if regression else way) * code, hidden, way)
        self.way = way

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def adapt(self, support: Examples) -> Predictor:
        check_way(self.way, support.targets)
        scaled = scaling(support.inputs, self.standardise)
        code = self._code(Examples(scaled(support.inputs), support.targets))
        return lambda queries: self.decoder(torch.cat([scaled(queries), code.expand(queries.shape[0], -1)], dim=1))

    def _code(self, support: Examples) -> Tensor:
        """The code of the episode: `[way * code]`, in regression `[code]`."""
        if self.regression:
            return self.encoder(torch.cat(support, dim=1)).mean(0)
        return centroids(Examples(self.encoder(support.inputs), support.targets)).flatten()


def _network(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out))
