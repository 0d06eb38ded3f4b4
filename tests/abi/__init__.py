# SPDX-License-Identifier: Apache-2.0
"""The C interface from outside: in ctypes, with a model of what it accepts and of what comes out.

structs      the header's structs, enums and functions
calls        a call as plain data, made from it
worker       a process that makes calls, so that a crash is reported and not suffered
model        what the header says that a call must be refused for
norm_model   the same of a norm's calls
verdict      the model's word on a call, entry by entry
oracle       what a call that is not refused leaves in memory, by `revkernels.reference`
norm_oracle  the same of a norm's calls
samples      one right call of every entry, and calls that came out wrong once
cases        random calls, for Hypothesis
fuzzer       calls on one library, judged by all of these
"""
