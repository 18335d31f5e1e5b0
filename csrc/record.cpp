// What this library was built from, readable in the file without loading it (eventlens_ds/ops/build.py).
//
// EVENTLENS_RECORD is one line of JSON: a fingerprint of the sources in csrc/, so that a library of older sources is
// refused, and why it has no CUDA kernels, if it has none.
extern "C" __attribute__((visibility("default"), used)) const char eventlens_csrc_record[] =
    "eventlens_csrc_record:" EVENTLENS_RECORD "\n";
