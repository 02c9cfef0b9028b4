"""The methods by the name of `--method`: functions from a problem to a `Trainer`."""

from collections.abc import Callable
from functools import partial

from vision.methods.ensemble import ensemble
from vision.methods.ivon import ivon
from vision.methods.laplace import laplace
from vision.methods.mc_dropout import mc_dropout
from vision.methods.ngvi import ngvi
from vision.methods.point import adam, muon, point, second_order, sgd
from vision.methods.swag import swag
from vision.methods.trainer import Problem, Trainer

METHODS: dict[str, Callable[[Problem], Trainer]] = {
    "adam": partial(point, make=adam),
    "sgd": partial(point, make=sgd),
    "muon": partial(point, make=muon),
    "second-order": partial(point, make=second_order),
    "ngvi": ngvi,
    "laplace": laplace,
    "ensemble": ensemble,
    "mc-dropout": mc_dropout,
    "swag": swag,
    "ivon": ivon,
}
