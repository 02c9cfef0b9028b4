"""Networks whose outputs are no plain tensor, as those of Hugging Face that are given labels."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer, ivon

Wrap = Callable[[Tensor, Tensor, Tensor], Any]


class ModelOutput(OrderedDict):
    """As of Hugging Face: a mapping with attributes that pytree does not know."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass(frozen=True)
class Record:
    loss: Tensor
    logits: Tensor
    hidden: Tensor


class Row(NamedTuple):
    loss: Tensor
    logits: Tensor
    hidden: Tensor


WRAPS: dict[str, Wrap] = {
    "ModelOutput": lambda loss, logits, hidden: ModelOutput(
        loss=loss, hidden_states=(hidden,), logits=logits),
    "dict": lambda loss, logits, hidden: {"loss": loss, "out": {"logits": logits, "h": hidden}},
    "tuple": lambda loss, logits, hidden: (loss, logits, hidden),
    "named tuple": Row,
    "dataclass": Record,
}


class Network(nn.Module):
    """Logits alone without labels, otherwise also their loss and hidden states."""

    def __init__(self, wrap: Wrap | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wrap, self.first, self.last = wrap, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, scale: Any = None, labels: Tensor | None = None) -> Any:
        hidden = self.first(inputs if scale is None else inputs * scale).tanh()
        logits = self.last(hidden)
        if self.wrap is None:
            return logits
        loss = torch.zeros(()) if labels is None else F.cross_entropy(logits, labels)
        return self.wrap(loss, logits, hidden)


def loss_of(output: Any) -> Tensor:
    if isinstance(output, Record):
        return output.loss
    return output["loss"] if isinstance(output, dict) else output[0]


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "second order": lambda net: SecondOrderOptimizer(net, curvature=Curvature("ggn", every=1)),
    "empirical": lambda net: SecondOrderOptimizer(
        net, curvature=Curvature("empirical", every=1)),
    "variational": lambda net: VIOptimizer(net, 16, curvature=Curvature("fisher", every=1)),
    "ivon": lambda net: ivon(net, 16),
}
X, Y = torch.randn(16, 4), torch.randint(3, (16,))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("make", MAKE)
def test_logits_are_found_in_any_output(make: str, wrap: str) -> None:
    """The steps are those of the network that returns its logits."""
    def run(kind: Wrap | None) -> list[Tensor]:
        net = Network(kind)
        optimizer = MAKE[make](net)
        for _ in range(3):
            optimizer.zero_grad()
            with getattr(optimizer, "sampled_params", nullcontext)():
                if kind is None:
                    F.cross_entropy(net(X), Y).backward()
                else:
                    loss_of(net(inputs=X, labels=Y)).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    assert all(map(torch.equal, run(WRAPS[wrap]), run(None)))


@pytest.mark.parametrize("wrap", WRAPS)
def test_predictions_have_the_form_of_the_output(wrap: str) -> None:
    net = Network(WRAPS[wrap])
    optimizer = VIOptimizer(net, 16)
    with optimizer.sampled_params():
        loss_of(net(X, labels=Y)).backward()
    optimizer.step()
    torch.manual_seed(1)
    output = optimizer.predict(X, num_samples=5, labels=Y)
    net.wrap = None
    torch.manual_seed(1)
    logits = optimizer.predict(X, num_samples=5)
    assert type(output) is type(WRAPS[wrap](X, X, X)) and loss_of(output).shape == (5,)
    found = output["out"]["logits"] if wrap == "dict" else (
        output[1] if wrap == "tuple" else output.logits)
    assert torch.equal(found, logits) and logits.shape == (5, 16, 3)


def test_without_a_tensor_of_logits_it_says_so() -> None:
    net = nn.Linear(4, 3)
    optimizer = SecondOrderOptimizer(Wrapped(net))
    optimizer.net(X)["loss"].sum().backward()
    with pytest.raises(ValueError, match="2 axes or more, the batch first, got dict"):
        optimizer.step()


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return {"loss": self.net(x).square().sum(-1)}


# ---- models -------------------------------------------------------------------------------------

BATCHES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "x, y": lambda call: call(X, Y),
    "x, y=": lambda call: call(X, y=Y),
    "keywords": lambda call: call(inputs=X, labels=Y),
    "keywords of the network": lambda call: call(X, scale=1.0, y=Y),
    "dict": lambda call: call({"inputs": X, "labels": Y}),
    "dict and y": lambda call: call({"inputs": X}, Y),
    "mapping": lambda call: call(ModelOutput(inputs=X, scale=torch.ones(16, 1), labels=Y)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("wrap", [None, "ModelOutput", "tuple"])
def test_a_classifier_takes_batches_of_any_form(batch: str, wrap: str | None) -> None:
    def run(name: str, kind: str | None) -> list[float]:
        torch.manual_seed(0)
        model = Classifier(bayesianize(Network(WRAPS[kind] if kind else None)), num_data=16)
        ngvi = NGVI(model, KFACGuide(model))
        return [BATCHES[name](ngvi.step) for _ in range(3)]

    assert run(batch, wrap) == run("x, y", None)


def test_so_does_a_regressor() -> None:
    targets = torch.randn(16, 3)
    model = Regressor(bayesianize(Network(WRAPS["dict"])), num_data=16, noise=1.0)
    torch.manual_seed(0)
    found = model({"inputs": X, "labels": targets})
    torch.manual_seed(0)
    assert torch.equal(found, model(X, targets)) and found.shape == (16, 3)


def test_a_classifier_names_what_is_missing() -> None:
    model = Classifier(bayesianize(Network()), num_data=16)
    with pytest.raises(TypeError, match="x: inputs of the network are needed"):
        model(labels=Y)
    with pytest.raises(TypeError, match="y: "):
        model({"inputs": X, "labels": [1, 2]})


# ---- Hugging Face -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
@pytest.mark.parametrize("kind", [SecondOrderOptimizer, VIOptimizer])
def test_a_bert_trains(kind: Any) -> None:
    """In a loop of its own, and `SecondOrderOptimizer` by `Trainer`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=10, num_labels=3,
    )
    net = transformers.BertForSequenceClassification(config)
    tokens, labels = torch.randint(20, (16, 6)), torch.randint(3, (16,))
    options = {"num_data": 16} if kind is VIOptimizer else {}
    optimizer = kind(net, lr=0.05, **options)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with getattr(optimizer, "sampled_params", nullcontext)():
            loss = net(input_ids=tokens, labels=labels).loss
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0]
    if kind is VIOptimizer:
        output = optimizer.predict(input_ids=tokens, num_samples=4)
        assert output.logits.shape == (4, 16, 3)


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
def test_a_trainer_of_hugging_face_runs(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=10, num_labels=3,
    )
    net = transformers.BertForSequenceClassification(config)
    optimizer = SecondOrderOptimizer(net, lr=0.05)
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": torch.tensor(i % 3)}
            for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        net, arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    trainer.train()
    assert optimizer.update_counts()
