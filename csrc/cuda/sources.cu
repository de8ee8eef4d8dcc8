// SPDX-License-Identifier: Apache-2.0
// What the library was built from: _C.py looks for this text in the file before it loads it, since
// an older library beside newer CPU operators would be called with other arguments.
#define SSLDIFF_QUOTED(name) #name
#define SSLDIFF_TEXT(name) SSLDIFF_QUOTED(name)

extern "C" __attribute__((visibility("default"))) const char* ssldiff_cuda_sources() {
  return "ssldiff_fast built from " SSLDIFF_TEXT(SSLDIFF_SOURCES);
}
