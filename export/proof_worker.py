"""A process of its own that loads an exported file as a user's would and runs it on given batches.

`python -m dsg.export.proof_worker FILE BATCHES.npz RESULTS.npz DEVICE [plain]`: batches and results are arrays named
`NUMBER.images` and the like. An ONNX file is run with torch out of reach; `plain` leaves the op's native kernels aside.
"""

import sys
from pathlib import Path

import numpy as np

from dsg.export.container import read_contract
from dsg.export.contract import OUTPUTS, ExportError, Format


def main(file: str, batches: str, results: str, device: str, *options: str) -> None:
    """See above; an ExportError leaves as one line on stderr and exit code 2."""
    path = Path(file)
    contract = read_contract(path)
    given = np.load(batches)
    numbers = sorted({int(name.partition(".")[0]) for name in given.files})
    if contract.format is Format.ONNX:
        sys.modules["torch"] = None  # type: ignore[assignment]  # whoever imports it now fails
        from dsg.export.onnx_runtime import OnnxNetwork

        run = OnnxNetwork(path, device, with_library="plain" not in options)
    else:
        import torch

        from dsg.export.loading import check_trust
        from dsg.export.program_runtime import load_program
        from dsg.model.network.float32 import whole_float32

        check_trust(path, contract)
        program = load_program(path, contract, torch.device(device))

        def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:  # type: ignore[misc]
            with torch.inference_mode(), whole_float32():
                outputs = program(torch.from_numpy(images).to(device), torch.from_numpy(sizes).to(device))
            return {name: output.cpu().numpy() for name, output in zip(OUTPUTS, outputs, strict=True)}

    found = {}
    for number in numbers:
        outputs = run(given[f"{number}.images"], given[f"{number}.sizes"])
        found.update({f"{number}.{name}": array for name, array in outputs.items()})
    np.savez(results, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ExportError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
