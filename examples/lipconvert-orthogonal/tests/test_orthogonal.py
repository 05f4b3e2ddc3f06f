import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.nn.utils.parametrize import register_parametrization

import lipconvert as lc
from lipconvert.testing import PluginConformance


class TestOrthogonal(PluginConformance):
    plugin = "orthogonal"


def _claim(module: nn.Module) -> object:
    return lc.registry().ask("orthogonal", "to_dae", model=module.double(), input_shape=(4,))


def test_constant_of_float32_weights_is_an_upper_bound():
    # With trivialisation the base matrix is stored, and it is orthogonal to float32's precision only.
    torch.manual_seed(0)
    model = orthogonal(nn.Linear(16, 16)).float()
    assert isinstance(model, nn.Linear)
    net = lc.convert(model)
    norm = torch.linalg.svdvals(model.weight.detach().double())[0].item()
    assert norm <= net.lipschitz <= norm * (1.0 + 1e-12)  # the bound's own inflation is 4·16 units round-off


def test_other_parametrisations_are_not_claimed():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    torch.manual_seed(0)
    doubled = orthogonal(nn.Linear(4, 4))
    register_parametrization(doubled, "weight", Twice())
    assert _claim(orthogonal(nn.Linear(4, 4))) is not None
    assert _claim(doubled) is None
    assert _claim(spectral_norm(nn.Linear(4, 4))) is None
    assert _claim(nn.Linear(4, 4)) is None
