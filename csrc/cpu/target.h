// Target regions: code between the two macros is compiled for the named instruction set whatever
// the compiler's flags say, so one binary holds every set and chooses at run time.
//
// Open a region only after all standard headers are included: inline functions of a header that
// is read inside a region are compiled with its instructions, and the linker may keep that copy
// for everyone, which crashes older CPUs.
#pragma once

#define LLMOS_PRAGMA(text) _Pragma(#text)
#if defined(__x86_64__) || defined(__aarch64__)
#define LLMOS_TARGET_BEGIN(set) LLMOS_PRAGMA(GCC push_options) LLMOS_PRAGMA(GCC target(set))
#define LLMOS_TARGET_END LLMOS_PRAGMA(GCC pop_options)
#else
#define LLMOS_TARGET_BEGIN(set)
#define LLMOS_TARGET_END
#endif
