# SPDX-License-Identifier: Apache-2.0
"""Memory budgets: what keeping tensors costs and saves, which plan is best, and how a plan is carried out."""
