# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per operator. Nothing here is imported before a kernel is needed."""
