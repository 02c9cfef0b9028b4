"""Pictures of predictions, posteriors and curvature, drawn with matplotlib on the axes given.

matplotlib is imported inside of the functions only.
"""

from pyrocurv.plots.bands import predictive_band
from pyrocurv.plots.calibration import reliability, risk_coverage
from pyrocurv.plots.images import entropy_histogram, uncertain_images
from pyrocurv.plots.matrices import heat_map, spectrum
from pyrocurv.plots.weights import weight_noise

__all__ = [
    "entropy_histogram", "heat_map", "predictive_band", "reliability", "risk_coverage", "spectrum",
    "uncertain_images", "weight_noise",
]
