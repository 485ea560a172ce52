# SPDX-License-Identifier: Apache-2.0
"""What a trained model is worth, measured on clips it has not seen."""
