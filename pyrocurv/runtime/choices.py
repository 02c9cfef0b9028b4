"""The words that arguments take, as types: editors complete them, and type checkers know them."""

from typing import Literal

Auto = Literal["auto"]
CurvatureKind = Literal["hessian", "ggn", "fisher", "empirical", "noise"]
FanIn = Literal["fan_in"]
Heteroscedastic = Literal["heteroscedastic"]
LikelihoodName = Literal["categorical", "bernoulli", "normal"]
Link = Literal["auto", "mc", "probit"]
Nonfinite = Literal["raise", "skip"]
Per = Literal["layer", "model"]
Schedule = Literal["auto", "schedule"]
Sharing = Literal["expand", "reduce"]
StructureName = Literal["full", "block", "diag", "kfac", "ekfac", "kfac-block", "point", "frozen"]
UpdateName = Literal["auto", "natural", "whitened-muon", "muon", "soap"]
