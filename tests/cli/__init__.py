"""Tests of the batch tool."""
