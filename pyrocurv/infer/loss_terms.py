"""The two terms of a loss, N nll + T KL, at the weights that a step was taken from."""

from __future__ import annotations

from dataclasses import dataclass

from pyrocurv.posterior.step import Update


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a step consists of, in nats and for all N data.

    Attributes:
        nll: negative log likelihood of the data, the mean over the samples.
        kl: log q - log p at the samples, an unbiased estimate of the KL divergence from the prior;
            with that of latents in the fallback guide. The divergence itself at the mean.
        temperature: T of the step.
        num_data: N; None where it is unknown, for a likelihood that is a factor outside of any
            plate.
    """

    nll: float
    kl: float
    temperature: float
    num_data: float | None

    @staticmethod
    def of(update: Update) -> LossTerms:
        """Those of an update."""
        temperature = update.posterior.temperature.value or 1.0
        kl = (update.loss - update.nll) / temperature
        return LossTerms(update.nll, kl, temperature, update.num_data)

    @property
    def loss(self) -> float:
        """N nll + T KL."""
        return self.nll + self.temperature * self.kl
