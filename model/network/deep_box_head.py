"""Box head of torchvision's second recipe (`maskrcnn_resnet50_fpn_v2`). R RoIs, C channels, P side of the features."""

from torch import Tensor, nn
from torch.nn import functional

from dsg.model.network.norm import HeadNorm


class DeepBoxHead(nn.Module):
    """Four 3x3 convolutions with batch norm and one fully connected layer, then what `BoxHead` gives.

    Args:
        channels: C.
        pool: P.
        width: of the hidden layer.
        outputs: num_classes + 1.
    """

    def __init__(self, channels: int, pool: int, width: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(HeadNorm(channels) for _ in range(4))
        self.fc1 = nn.Linear(channels * pool * pool, width)
        self.classifier = nn.Linear(width, outputs)
        self.regressor = nn.Linear(width, outputs * 4)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)
        for layer, std in ((self.classifier, 0.01), (self.regressor, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Tensor[R, C, P, P] -> class logits [R, num_classes + 1] and deltas [R, num_classes + 1, 4]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = functional.relu(norm(conv(features)), inplace=True)  # [R, C, P, P]
        hidden = functional.relu(self.fc1(features.flatten(1)))  # [R, C * P * P] -> [R, width]
        return self.classifier(hidden), self.regressor(hidden).unflatten(1, (-1, 4))
