"""What torch does with tensors on a CUDA device, as its documentation says: on a real one, where there is one, and on the
one that `pretended_device` pretends. So a pretence that torch no longer keeps to is seen wherever there is a device."""

import copy
import gc
import io

import numpy as np
import pytest
import torch
from pretended_device import PretendedDevice, marked
from torch import Tensor, nn

MIXED = r"same device|expected device|but got .* on cpu|is on cpu|tensor on cpu|device type"

on_both = pytest.mark.usefixtures("device")


@pytest.fixture
def there(device: None) -> Tensor:
    """1 … 6 on the device, (2, 3)."""
    return torch.arange(1.0, 7.0, device="cuda").reshape(2, 3)


@on_both
def test_torch_has_one_device():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() >= 1
    assert torch.cuda.current_device() == 0
    assert isinstance(torch.cuda.get_device_name(), str)
    assert torch.cuda.get_device_capability() >= (7, 0)
    torch.cuda.synchronize()


MAKERS = {
    "zeros": lambda device: torch.zeros(2, 3, device=device),
    "empty": lambda device: torch.empty(2, 3, device=device),
    "full": lambda device: torch.full((2, 3), 1.5, device=device),
    "arange": lambda device: torch.arange(6, device=device),
    "eye": lambda device: torch.eye(3, device=device),
    "linspace": lambda device: torch.linspace(0, 1, 5, device=device),
    "rand": lambda device: torch.rand(2, device=device),
    "randperm": lambda device: torch.randperm(4, device=device),
    "tensor": lambda device: torch.tensor([1.0, 2.0], device=device),
    "as_tensor": lambda device: torch.as_tensor(np.ones(3), device=device),
    "asarray": lambda device: torch.asarray([1.0], device=device),
    "zeros_like": lambda device: torch.zeros_like(torch.ones(2), device=device),
    "new_zeros": lambda device: torch.ones(2).new_zeros(3, device=device),
    "to": lambda device: torch.ones(2).to(device),
    "to with a dtype": lambda device: torch.ones(2).to(device, torch.float32, copy=True),
    "to as another": lambda device: torch.ones(2).to(torch.ones(1, device=device)),
    "a linear map": lambda device: nn.Linear(2, 3, device=device).weight,
    "a moved module": lambda device: nn.Linear(2, 3).to(device).weight,
    "a moved buffer": lambda device: nn.BatchNorm1d(2).to(device=device).running_mean,
}


@on_both
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("device_name", ["cuda", "cuda:0", 0, "cpu", torch.device("cuda", 0)])
def test_tensors_are_made_where_they_are_told(maker, device_name):
    x = MAKERS[maker](device_name)
    cuda = device_name != "cpu"
    assert x.device == (torch.device("cuda", 0) if cuda else torch.device("cpu"))
    assert (x.is_cuda, x.is_cpu, x.get_device()) == (cuda, not cuda, 0 if cuda else -1)


FOLLOWERS = {
    "zeros_like": torch.zeros_like,
    "rand_like": torch.rand_like,
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "new_ones": lambda x: x.new_ones(2),
    "a product": lambda x: x @ x.mT,
    "a sum with a number": lambda x: 1.0 + x,
    "a sum with a scalar of the CPU": lambda x: x + torch.tensor(2.0),
    "where with a scalar of the CPU": lambda x: torch.where(x > 0, torch.tensor(2.0), x),
    "a scalar times itself": lambda x: torch.tensor(2.0) * x,
    "a view": lambda x: x.mT[0],
    "data": lambda x: x.data,
    "detach": lambda x: x.detach(),
    "a parameter": nn.Parameter,
    "deepcopy": copy.deepcopy,
    "a deep copy of a module": lambda x: copy.deepcopy(nn.ParameterList([x]))[0],
    "one_hot": lambda x: nn.functional.one_hot(x.long()),
    "cross_entropy": lambda x: nn.functional.cross_entropy(x, x.argmax(1)),
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x)),
    "svd": lambda x: torch.linalg.svdvals(x),
    "a CPU index": lambda x: x[torch.tensor([0, 1])],
    "a CPU mask": lambda x: x[torch.tensor([True, False])],
    "its own index": lambda x: x[x > 2],
    "as_tensor": torch.as_tensor,
    "cast": lambda x: x.float().double(),
    "copied into": lambda x: torch.empty_like(x).copy_(torch.ones(2, 3)),
    "set by a number": lambda x: x.index_put((torch.tensor([0]),), torch.tensor(3.0)),
    "grad": lambda x: torch.autograd.grad((y := x.clone().requires_grad_()).square().sum(), y)[0],
    "grad through a move": lambda x: torch.autograd.grad((y := x.clone().requires_grad_()).cpu().square().sum(), y)[0],
}


@on_both
@pytest.mark.parametrize("follower", FOLLOWERS)
def test_what_is_made_of_a_tensor_is_on_its_device(follower, there):
    assert FOLLOWERS[follower](there).device.type == "cuda"
    assert FOLLOWERS[follower](there.cpu()).device.type == "cpu"


LEAVERS = {
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to as another": lambda x: x.to(torch.zeros(1)),
    "zeros_like, told otherwise": lambda x: torch.zeros_like(x, device="cpu"),
    "new_zeros, told otherwise": lambda x: x.new_zeros(2, device="cpu"),
    "tensor of a number": lambda x: torch.tensor(float(x.sum())),
    "from_numpy": lambda x: torch.from_numpy(x.cpu().numpy()),
    "zeros": lambda x: torch.zeros(x.shape),
    "copied from": lambda x: torch.ones(2, 3).copy_(x),
    "grad through a move": lambda x: torch.autograd.grad((y := torch.ones(2).requires_grad_()).cuda().sum(), y)[0],
}


@on_both
@pytest.mark.parametrize("leaver", LEAVERS)
def test_what_leaves_the_device_is_on_the_cpu(leaver, there):
    x = LEAVERS[leaver](there)
    assert x.device.type == "cpu"
    x.numpy()


MIXTURES = {
    "a sum": lambda x: x + torch.ones(3),
    "a sum in place": lambda x: x.add_(torch.ones(3)),
    "a scalar of the device in place": lambda x: torch.ones(3).add_(x.sum()),
    "a sum the other way": lambda x: torch.ones(3).add_(x[0]),
    "a vector of one entry": lambda x: x + torch.ones(1),
    "matmul": lambda x: x @ torch.ones(3, 2),
    "linear": lambda x: nn.Linear(3, 2)(x),
    "where": lambda x: torch.where(torch.ones(2, 3, dtype=torch.bool), x, x),
    "masked_fill": lambda x: x.masked_fill(torch.ones(2, 3, dtype=torch.bool), 0.0),
    "cat": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "scatter": lambda x: x.scatter(1, torch.zeros(2, 1, dtype=torch.long), 1.0),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "an index of the device into the CPU": lambda x: torch.ones(7)[x.long()],
    "an index, put from the CPU": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(3)),
    "and of masks": lambda x: (x > 0) & torch.ones(3, dtype=torch.bool),
    "and of masks in place": lambda x: (x > 0).__iand__(~torch.eye(3, dtype=torch.bool)[:2]),
    "solve": lambda x: torch.linalg.solve(x[:, :2], torch.ones(2)),
    "out": lambda x: torch.add(x, 1.0, out=torch.empty(2, 3)),
    "cross_entropy": lambda x: nn.functional.cross_entropy(x, torch.tensor([0, 1])),
    "backward": lambda x: x.clone().requires_grad_().backward(torch.ones(2, 3)),
    "a step of Adam": lambda x: _step_with_a_gradient_of_the_cpu(x),
}


def _step_with_a_gradient_of_the_cpu(x: Tensor) -> None:
    parameter = nn.Parameter(x.clone())
    optimiser = torch.optim.Adam([parameter], fused=True)
    (parameter.square().sum()).backward()
    optimiser.step()
    parameter.grad = torch.ones(2, 3)
    optimiser.step()


@on_both
@pytest.mark.parametrize("mixture", MIXTURES)
def test_operations_among_both_are_refused(mixture, there):
    with pytest.raises(RuntimeError, match=MIXED):
        MIXTURES[mixture](there)


@on_both
def test_numpy_is_for_the_cpu(there):
    for convert in (Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match=r"Tensor.cpu\(\)"):
            convert(there)
    assert there.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert there.sum().item() == 21.0


@on_both
def test_random_numbers_are_those_of_the_device():
    torch.manual_seed(1)
    here = torch.rand(3)
    torch.manual_seed(1)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3), here)  # the CPU's were not touched
    again = torch.rand(3, device="cuda")
    assert not torch.equal(drawn, again)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1, device="cuda")
    assert not torch.equal(torch.rand(3, device="cuda"), again)


@on_both
def test_generators_draw_on_their_own_device():
    draws = [torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.Generator("cuda").device.type == "cuda"
    assert isinstance(torch.default_generator, torch.Generator)
    with pytest.raises(RuntimeError, match=r"Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match=r"Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.rand(3, generator=torch.Generator("cuda"))


@on_both
def test_the_default_device():
    with torch.device("cuda"):
        assert torch.ones(2).device.type == "cuda"
        assert torch.tensor([1.0]).device.type == "cuda"
        assert nn.Linear(2, 2).weight.device.type == "cuda"
        assert torch.ones(2, device="cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=torch.Generator("cpu"))
        with torch.device("cpu"):
            assert torch.tensor([1.0]).device.type == "cpu"
    assert torch.ones(2).device.type == "cpu"


@on_both
def test_files_say_where_tensors_were(there):
    for location, expected in ((None, "cuda"), ("cpu", "cpu"), ("cuda", "cuda")):
        file = io.BytesIO()
        torch.save({"x": there, "y": there.cpu()}, file)
        file.seek(0)
        loaded = torch.load(file, map_location=location)
        assert loaded["x"].device.type == expected
        assert loaded["y"].device.type == ("cpu" if location is None else expected)
        assert loaded["x"].tolist() == there.tolist()


class _Wrong(torch.autograd.Function):
    """Whose gradient is on the CPU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(2, 3)


class _Unused(torch.autograd.Function):
    """Two outputs: the gradient of one that nobody uses is filled in, on the device of the tensor."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x, 3.0 * x

    @staticmethod
    def backward(ctx, first, second):
        return 2.0 * first + 3.0 * second


@on_both
def test_gradients_of_custom_functions(there):
    x = there.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="invalid gradient"):
        torch.autograd.grad(_Wrong.apply(x).sum(), x)
    gradient = torch.autograd.grad(_Unused.apply(x)[0].sum(), x)[0]
    assert gradient.device.type == "cuda"
    assert torch.equal(gradient.cpu(), torch.full((2, 3), 2.0))


@on_both
def test_an_optimiser_trains_a_module_as_on_the_cpu():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, labels = torch.randn(5, 3), torch.arange(5) % 2
    trained = []
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(model).to(device)
        optimiser = torch.optim.Adam(moved.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            optimiser.zero_grad()
            nn.functional.cross_entropy(moved(x.to(device)), labels.to(device)).backward()
            nn.utils.clip_grad_norm_(moved.parameters(), 0.1)
            optimiser.step()
        assert {p.grad.device.type for p in moved.parameters()} == {device}
        assert {value.device.type for value in optimiser.state_dict()["state"][0].values()} == {device}
        trained.append([p.detach().cpu() for p in moved.parameters()])
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs)


@on_both
def test_autocast_lowers_products_on_the_device(there):
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert (there.float() @ there.float().mT).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cuda")


@on_both
def test_a_second_device_is_not_there():
    if torch.cuda.device_count() > 1:
        pytest.skip("it is")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:1")


# What is only pretended.


def test_synchronisations_are_counted_where_the_host_waits():
    with PretendedDevice() as device:
        x = torch.zeros(3, device="cuda")
        y = x @ x + x.sum() * 2.0
        torch.where(y > 0, y, x).masked_fill_(x > 0, 1.0)
        assert not device.synchronisations
        assert float(x.sum()) == 0.0
        bool((x > 0).any())
        x.cpu()
        x.nonzero()
        x[x > 0]
        x.tolist()
        assert sum(device.synchronisations.values()) == 6
        assert all(__file__ in place for place in device.synchronisations)
        before = device.synchronisations.total()
        float(torch.zeros(3).sum())
        assert device.synchronisations.total() == before


def test_marks_go_with_their_storage():
    with PretendedDevice():
        x = torch.zeros(3, device="cuda")
        view = x.reshape(3, 1)[1:].mT
        del x
        gc.collect()
        assert marked(view)
        del view
        gc.collect()
        assert not any(marked(torch.zeros(3)) for _ in range(100))


def test_nothing_is_left_behind():
    before = {name: vars(Tensor).get(name) for name in ("device", "to", "cuda", "numpy", "tolist")}
    packages, generator = list(torch.serialization._package_registry), torch.Generator
    with pytest.raises(KeyError), PretendedDevice():
        raise KeyError
    assert {name: vars(Tensor).get(name) for name in before} == before
    assert torch.serialization._package_registry == packages
    assert torch.Generator is generator
    assert torch.zeros(1).device.type == "cpu"
