"""Optimizers with a structured curvature for any PyTorch loop; no Pyro in sight."""



from pyrocurv.optim.presets import ivon, noisy_ekfac, noisy_kfac, vogn
from pyrocurv.optim.second_order import SecondOrderOptimizer
from pyrocurv.optim.vi import VIOptimizer

__all__ = ["SecondOrderOptimizer", "VIOptimizer", "ivon", "noisy_ekfac", "noisy_kfac", "vogn"]
