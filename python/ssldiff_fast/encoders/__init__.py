# SPDX-License-Identifier: Apache-2.0
"""SSL encoders: what they are (`EncoderSpec`) and patches to embeddings (`Encoder`)."""

from ssldiff_fast.encoders.encoder import Encoder
from ssldiff_fast.encoders.spec import EncoderSpec

__all__ = ["Encoder", "EncoderSpec"]
