"""Layers, the neutral graph, channel groups and cost."""

from slimbridge.graph.cost import Cost, cost_of, cost_without, count_parameters
from slimbridge.graph.model import KINDS, Call, Graph, Node
from slimbridge.graph.provenance import OUTPUT
from slimbridge.graph.units import ChannelGroup, UnitProducer, Units, find_units
from slimbridge.graph.walk import Rules

__all__ = [
    "KINDS",
    "OUTPUT",
    "Call",
    "ChannelGroup",
    "Cost",
    "Graph",
    "Node",
    "Rules",
    "UnitProducer",
    "Units",
    "cost_of",
    "cost_without",
    "count_parameters",
    "find_units",
]
