"""The torch boundary: whatever touches a model lives here; of the rest only services that own a model import torch."""
