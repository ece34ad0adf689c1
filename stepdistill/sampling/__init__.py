"""Loads a rung into an ordinary diffusers pipeline, with the scheduler, steps and guidance that it was trained for."""

from stepdistill.sampling.few_step import ADAPTER as ADAPTER
from stepdistill.sampling.few_step import FewStepWarning as FewStepWarning
from stepdistill.sampling.few_step import load_few_step as load_few_step
from stepdistill.sampling.few_step import load_rung as load_rung
from stepdistill.sampling.onnx_network import load_onnx as load_onnx
