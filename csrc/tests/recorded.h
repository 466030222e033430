// Calls of kernels as tests/ops/record.py writes them, and what holds a kernel to one.
//
// Every tensor lies in memory of exactly its size, so that under the address sanitizer one element too many is an
// error.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernel.h"

namespace {

struct Argument {
  char kind;  // n null, i integer, d real, m memory that is read, o memory that is written
  int64_t integer = 0;
  double real = 0;
  size_t item = 0;            // bytes of an element
  std::vector<char> bytes{};  // of what is read
  char type = 0;              // of what is written: f float32, d float64, h bfloat16
  std::vector<double> wanted{}, bound{};

  size_t size() const { return kind == 'm' ? bytes.size() : wanted.size() * item; }
};

struct Call {
  std::string op, id;
  std::vector<Argument> arguments;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb"), &std::fclose) {
    if (file_ == nullptr) fail(std::string("cannot read ") + path);
  }

  // False at the end of the file.
  bool next(Call& call) {
    const int first = std::fgetc(file_.get());
    if (first == EOF) return false;
    std::ungetc(first, file_.get());
    call.op = text(), call.id = text();
    call.arguments.resize(static_cast<size_t>(value<int64_t>()));
    for (Argument& argument : call.arguments) argument = this->argument();
    return true;
  }

 private:
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, file_.get()) != bytes) fail("the file ends within a call");
  }
  template <typename T>
  T value() {
    T value;
    read(&value, sizeof(value));
    return value;
  }
  template <typename T>
  std::vector<T> values(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    read(values.data(), values.size() * sizeof(T));
    return values;
  }
  std::string text() {
    const std::vector<char> letters = values<char>(value<int64_t>());
    return std::string(letters.begin(), letters.end());
  }
  Argument argument() {
    Argument argument{value<char>()};
    if (argument.kind == 'i') {
      argument.integer = value<int64_t>();
    } else if (argument.kind == 'd') {
      argument.real = value<double>();
    } else if (argument.kind == 'm') {
      argument.item = static_cast<size_t>(value<int64_t>());
      argument.bytes = values<char>(value<int64_t>());
    } else if (argument.kind == 'o') {
      argument.type = value<char>();
      argument.item = argument.type == 'd' ? 8 : argument.type == 'f' ? 4 : 2;
      const int64_t count = value<int64_t>();
      argument.wanted = values<double>(count);
      argument.bound = values<double>(count);
    } else if (argument.kind != 'n') {
      fail(std::string("an argument of unknown kind ") + argument.kind);
    }
    return argument;
  }

  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

// Memory of just so many bytes, `shift` behind where `new` puts it.
class Memory {
 public:
  Memory(size_t bytes, size_t shift) : all_(new char[bytes + shift]), shift_(shift) {}
  char* data() const { return all_.get() + shift_; }

 private:
  std::unique_ptr<char[]> all_;
  size_t shift_;
};

double element(char type, const char* from) {
  if (type == 'd') {
    double value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  uint32_t bits = 0;
  if (type == 'f') {
    std::memcpy(&bits, from, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, from, 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return static_cast<double>(value);
}

// NaN is right where it is wanted, and nowhere else.
bool right(double got, double wanted, double bound) {
  if (std::isnan(wanted)) return std::isnan(got);
  return got == wanted || std::fabs(got - wanted) <= bound;
}

dz::Word word_of(char code, const Argument& argument, const Memory& memory) {
  dz::Word word;
  const bool pointer = argument.kind == 'n' || argument.kind == 'm' || argument.kind == 'o';
  if (pointer != (code == 'p')) {
    throw std::invalid_argument(pointer ? "a pointer where the kernel takes a number"
                                        : "a number where the kernel takes a pointer");
  }
  if (pointer) {
    word.address = argument.kind == 'n' ? nullptr : memory.data();
  } else if (code == 'd') {
    word.real = argument.kind == 'd' ? argument.real : static_cast<double>(argument.integer);
  } else if (argument.kind == 'd') {
    throw std::invalid_argument("a real number where the kernel takes an integer");
  } else {
    word.integer = argument.integer;
  }
  return word;
}

// Runs a call of `kernel`, called `what` in errors. Its memory begins where `new` puts it, or an element behind.
void replay(const Call& call, const dz::Kernel& kernel, std::string what, bool shifted) {
  what = call.op + ", case '" + call.id + "', " + what + (shifted ? ", unaligned" : "");
  if (std::strlen(kernel.codes) != call.arguments.size()) {
    fail(what + ": the kernel takes " + std::to_string(std::strlen(kernel.codes)) + " arguments, the call has " +
         std::to_string(call.arguments.size()));
  }
  std::vector<Memory> memory;
  std::vector<dz::Word> words;
  for (const Argument& argument : call.arguments) {
    memory.emplace_back(argument.size(), shifted ? argument.item : 0);
    if (argument.kind == 'o') std::memset(memory.back().data(), 0xff, argument.size());  // NaN in each type
    if (!argument.bytes.empty()) std::memcpy(memory.back().data(), argument.bytes.data(), argument.bytes.size());
    try {
      words.push_back(word_of(kernel.codes[words.size()], argument, memory.back()));
    } catch (const std::invalid_argument& error) {
      fail(what + ": argument " + std::to_string(words.size()) + " is " + error.what());
    }
  }
  kernel.call(words.data());
  for (size_t at = 0; at < memory.size(); ++at) {
    const Argument& argument = call.arguments[at];
    if (!argument.bytes.empty() && std::memcmp(memory[at].data(), argument.bytes.data(), argument.bytes.size()) != 0) {
      fail(what + ": the kernel wrote to argument " + std::to_string(at) + ", which it may only read");
    }
    for (size_t i = 0; i < argument.wanted.size(); ++i) {
      const double got = element(argument.type, memory[at].data() + i * argument.item);
      if (right(got, argument.wanted[i], argument.bound[i])) continue;
      char text[160];
      std::snprintf(text, sizeof(text), ": element %zu is %.9g, wanted %.9g within %.3g", i, got, argument.wanted[i],
                    argument.bound[i]);
      fail(what + text);
    }
  }
}

}  // namespace
