# SPDX-License-Identifier: Apache-2.0
"""The C interface from outside: in ctypes, with a model of what it accepts and of what comes out.

structs     the header's structs, enums and functions
calls       a call as plain data, made from it
worker      a process that makes calls, so that a crash is reported and not suffered
model       what the header says that a call must be refused for
oracle      what a call that is not refused leaves in memory, by `revkernels.reference`
cases       random calls, for Hypothesis
"""
