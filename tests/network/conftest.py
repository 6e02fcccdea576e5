import sys
from pathlib import Path

# torchvision_twins.py lies beside the tests that share it
sys.path.insert(0, str(Path(__file__).parent))
