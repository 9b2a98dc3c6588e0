// The text of PTX into instructions.
#include <bit>
#include <cctype>
#include <cstdio>
#include <cstring>

#include "module.h"

namespace ptx {
namespace {

using Strings = std::vector<std::string>;

std::string strip(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return std::string(text);
}

Strings split(const std::string& text, char separator) {
  Strings parts;
  int depth = 0;
  std::string part;
  for (char c : text) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == separator && depth == 0) {
      parts.push_back(strip(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!strip(part).empty()) parts.push_back(strip(part));
  return parts;
}

bool read_type(const std::string& word, Type& type) {
  if (word == "pred") return type = {'p', 1}, true;
  if (word == "bf16") return type = {'h', 16, true}, true;
  if (word == "f16") return type = {'h', 16, false}, true;
  if (word == "bf16x2") return type = {'h', 32, true, 2}, true;
  if (word == "f16x2") return type = {'h', 32, false, 2}, true;
  if (word == "tf32") return type = {'t', 32}, true;
  if (word.size() < 2 || !std::strchr("busf", word[0])) return false;
  for (size_t i = 1; i < word.size(); ++i) {
    if (!std::isdigit(static_cast<unsigned char>(word[i]))) return false;
  }
  const int bits = std::stoi(word.substr(1));
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) return false;
  type = {word[0], bits};
  return true;
}

const std::map<std::string, Op> kOps = {{"add", Op::add},
                                        {"sub", Op::sub},
                                        {"mul", Op::mul},
                                        {"mad", Op::mad},
                                        {"fma", Op::fma},
                                        {"div", Op::div},
                                        {"rem", Op::rem},
                                        {"min", Op::min},
                                        {"max", Op::max},
                                        {"neg", Op::neg},
                                        {"abs", Op::abs},
                                        {"and", Op::and_},
                                        {"or", Op::or_},
                                        {"xor", Op::xor_},
                                        {"not", Op::not_},
                                        {"shl", Op::shl},
                                        {"shr", Op::shr},
                                        {"bfe", Op::bfe},
                                        {"lop3", Op::lop3},
                                        {"prmt", Op::prmt},
                                        {"popc", Op::popc},
                                        {"clz", Op::clz},
                                        {"mov", Op::mov},
                                        {"selp", Op::selp},
                                        {"setp", Op::setp},
                                        {"cvt", Op::cvt},
                                        {"cvta", Op::cvta},
                                        {"ex2", Op::ex2},
                                        {"rcp", Op::rcp},
                                        {"sqrt", Op::sqrt},
                                        {"rsqrt", Op::rsqrt},
                                        {"ld", Op::ld},
                                        {"st", Op::st},
                                        {"atom", Op::atom},
                                        {"red", Op::red},
                                        {"bra", Op::bra},
                                        {"ret", Op::ret},
                                        {"exit", Op::ret},
                                        {"bar", Op::bar},
                                        {"barrier", Op::bar},
                                        {"shfl", Op::shfl},
                                        {"vote", Op::vote},
                                        {"activemask", Op::activemask},
                                        {"cp", Op::cp_async},
                                        {"ldmatrix", Op::ldmatrix},
                                        {"mma", Op::mma},
                                        {"fence", Op::fence},
                                        {"membar", Op::fence}};

const std::map<std::string, Compare> kCompare = {
    {"eq", Compare::eq},   {"ne", Compare::ne},   {"lt", Compare::lt},   {"le", Compare::le},   {"gt", Compare::gt},
    {"ge", Compare::ge},   {"lo", Compare::lt},   {"ls", Compare::le},   {"hi", Compare::gt},   {"hs", Compare::ge},
    {"equ", Compare::equ}, {"neu", Compare::neu}, {"ltu", Compare::ltu}, {"leu", Compare::leu}, {"gtu", Compare::gtu},
    {"geu", Compare::geu}, {"num", Compare::num}, {"nan", Compare::nan}};

class Parser {
 public:
  explicit Parser(std::string_view text) {
    std::string line;
    for (char c : text) {
      if (c == '\n') {
        module_.lines.push_back(line);
        line.clear();
      } else {
        line += c;
      }
    }
    module_.lines.push_back(line);
  }

  Module run() {
    std::string statement;
    bool comment = false;
    for (size_t i = 0; i < module_.lines.size(); ++i) {
      line_ = int(i) + 1;
      const std::string& text = module_.lines[i];
      if (!kernel_ && text.find(".section") != std::string::npos) break;  // debugging information comes last
      for (size_t at = 0; at < text.size(); ++at) {                       // without comments
        if (comment) {
          if (text.compare(at, 2, "*/") == 0) comment = false, ++at;
          continue;
        }
        if (text.compare(at, 2, "//") == 0) break;
        if (text.compare(at, 2, "/*") == 0) {
          comment = true;
          ++at;
          continue;
        }
        const char c = text[at];
        if (c != '{' && c != '}' && c != ';' && c != ':') {
          statement += c;
          continue;
        }
        const std::string so_far = strip(statement);
        if (c == '{' && (!kernel_ || so_far.empty())) {
          if (!kernel_ || depth_ == 0) begin(so_far);
          ++depth_;
          statement.clear();
        } else if (c == '}' && so_far.empty()) {
          if (--depth_ == 0) end();
          statement.clear();
        } else if (c == ';') {
          if (!so_far.empty()) take(so_far);
          statement.clear();
        } else if (c == ':' && kernel_ && so_far.find_first_of(" \t.%") == std::string::npos &&
                   text.compare(at, 2, "::") != 0 && (so_far.empty() || so_far.back() != ':')) {
          labels_[so_far] = int(kernel_->code.size());
          statement.clear();
        } else if (c == ':' && kernel_ && so_far.rfind("$", 0) == 0) {
          labels_[so_far] = int(kernel_->code.size());
          statement.clear();
        } else {
          statement += c;
        }
      }
      statement += ' ';
      const std::string so_far = strip(statement);
      if (so_far.rfind(".loc", 0) == 0) locate(so_far);
      if (so_far.rfind(".file", 0) == 0) name_file(so_far);
      for (const char* skipped : {".version", ".target", ".address_size", ".loc", ".file", ".pragma"}) {
        if (so_far.rfind(skipped, 0) == 0) statement.clear();
      }
    }
    return std::move(module_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("PTX line " + std::to_string(line_) + ": " + what);
  }

  static std::pair<std::string, int64_t> variable(const std::string& text) {
    const size_t bracket = text.find('[');
    std::string head = strip(text.substr(0, bracket));
    const size_t space = head.find_last_of(" \t");
    const std::string name = head.substr(space + 1);
    Type type;
    int64_t bytes = 1;
    for (const auto& word : split(head.substr(0, space), '.')) {
      if (read_type(strip(word), type)) bytes = type.bits / 8;
    }
    if (bracket != std::string::npos && text[bracket + 1] != ']') bytes *= std::stoll(text.substr(bracket + 1));
    return {name, bytes};
  }

  static int64_t alignment(const std::string& text) {
    const size_t at = text.find(".align");
    if (at != std::string::npos) return std::stoll(text.substr(at + 6));
    for (const auto& word : split(text, '.')) {
      Type type;
      if (read_type(strip(word.substr(0, word.find(' '))), type)) return type.bits / 8;
    }
    return 1;
  }

  // .loc file line column[, function_name label, inlined_at file line column]
  void locate(const std::string& text) {
    int file = 0, line = 0, column = 0;
    if (std::sscanf(text.c_str(), ".loc %d %d %d", &file, &line, &column) != 3) fail("unknown form of " + text);
    int caller = -1;
    if (const size_t at = text.find("inlined_at"); at != std::string::npos) {
      std::array<int, 3> key{};
      std::sscanf(text.c_str() + at, "inlined_at %d %d %d", &key[0], &key[1], &key[2]);
      const auto [found, fresh] = places_.try_emplace(key, int(module_.places.size()));
      if (fresh) module_.places.push_back({key[0], key[1], -1});
      caller = found->second;
    }
    place_ = int(module_.places.size());
    module_.places.push_back({file, line, caller});
    places_[{file, line, column}] = place_;
  }

  void name_file(const std::string& text) {
    const size_t open = text.find('"'), slash = text.find_last_of('/'), close = text.find_last_of('"');
    const size_t first = slash == std::string::npos ? open + 1 : slash + 1;
    module_.files[std::stoi(text.substr(5))] = text.substr(first, close - first);
  }

  void begin(const std::string& head) {
    const size_t entry = head.find(".entry");
    if (entry == std::string::npos) fail("only kernels are known: " + head);
    const size_t open = head.find('(', entry);
    const std::string name = strip(head.substr(entry + 6, open - entry - 6));
    kernel_ = &module_.kernels[name];
    kernel_->name = name;
    slots_.clear();
    constants_.clear();
    labels_.clear();
    jumps_.clear();
    names_ = shared_;
    shared_end_ = module_shared_;
    int depth = 0;
    size_t close = open;
    for (; open != std::string::npos && close < head.size(); ++close) {
      if (head[close] == '(') ++depth;
      if (head[close] == ')' && --depth == 0) break;
    }
    if (open == std::string::npos) return;
    for (const auto& param : split(head.substr(open + 1, close - open - 1), ',')) {
      auto [param_name, bytes] = variable(param);
      int64_t& end = kernel_->param_bytes;
      const int64_t align = param.find(".ptr") == std::string::npos ? alignment(param) : 8;
      end = (end + align - 1) / align * align;
      names_[param_name] = uint64_t(end);
      kernel_->params.push_back({end, bytes});
      end += bytes;
    }
  }

  void end() {
    for (auto& [index, label] : jumps_) {
      if (!labels_.count(label)) fail("no label " + label);
      kernel_->code[size_t(index)].target = labels_[label];
    }
    Instruction last;
    last.op = Op::ret;
    last.line = line_;
    kernel_->code.push_back(last);
    kernel_->shared_bytes = shared_end_;
    // Constants are numbered downwards from -2 while registers are counted; now they go first.
    const int constants = int(kernel_->constants.size());
    auto place = [&](int& slot) { slot = slot >= 0 ? slot + constants : slot == -1 ? -1 : -2 - slot; };
    for (auto& i : kernel_->code) {
      for (int& slot : i.out) place(slot);
      for (int& slot : i.in) place(slot);
      if (i.guard != -1) place(i.guard);
    }
    kernel_->slots = constants + int(slots_.size());
    decode(*kernel_, module_.lines);
    kernel_ = nullptr;
  }

  void declare_shared(const std::string& text) {
    auto [name, bytes] = variable(text);
    const int64_t align = alignment(text);
    int64_t& end = kernel_ ? shared_end_ : module_shared_;
    end = (end + align - 1) / align * align;
    names_[name] = uint64_t(end);
    if (!kernel_) shared_[name] = uint64_t(end);
    if (text.find(".extern") == std::string::npos) end += bytes;
  }

  int constant(Constant::Kind kind, uint64_t value) {
    auto& all = kernel_->constants;
    const auto [found, fresh] = constants_.try_emplace({int(kind), value}, -2 - int(all.size()));
    if (fresh) all.push_back({kind, value});
    return found->second;
  }

  int slot(const std::string& text) {
    if (text == "_") return -1;
    if (text[0] == '%') {
      static const std::map<std::string, Constant::Kind> special = {
          {"%tid", Constant::Kind::tid},       {"%ntid", Constant::Kind::ntid},
          {"%ctaid", Constant::Kind::ctaid},   {"%nctaid", Constant::Kind::nctaid},
          {"%laneid", Constant::Kind::laneid}, {"%warpid", Constant::Kind::warpid}};
      const size_t dot = text.find('.');
      if (auto found = special.find(text.substr(0, dot)); found != special.end()) {
        return constant(found->second, dot == std::string::npos ? 0 : uint64_t(text[dot + 1] - 'x'));
      }
      if (!slots_.count(text)) {
        const int next = int(slots_.size());
        slots_[text] = next;
      }
      return slots_[text];
    }
    return constant(Constant::Kind::value, value(text));
  }

  uint64_t value(const std::string& text) const {
    if (text.rfind("0f", 0) == 0 || text.rfind("0F", 0) == 0) return std::stoull(text.substr(2), nullptr, 16);
    if (text.rfind("0d", 0) == 0 || text.rfind("0D", 0) == 0) return std::stoull(text.substr(2), nullptr, 16);
    if (text[0] == '-') return uint64_t(std::stoll(text, nullptr, 0));
    if (std::isdigit(static_cast<unsigned char>(text[0]))) return std::stoull(text, nullptr, 0);
    if (text == "WARP_SZ") return 32;
    const auto found = names_.find(text);
    if (found == names_.end()) fail("unknown operand " + text);
    return found->second;
  }

  void take(const std::string& text) {
    if (text[0] == '.') {
      const bool shared = text.find(".shared") != std::string::npos;
      if (shared) declare_shared(text);
      if (shared || text.rfind(".reg", 0) == 0 || text.rfind(".pragma", 0) == 0) return;
      // Variables of a module, which no kernel reads: an instruction that names one is an error.
      if (!kernel_ && (text.rfind(".global", 0) == 0 || text.rfind(".visible .global", 0) == 0)) return;
      fail("unknown directive " + text);
    }
    if (!kernel_) fail("an instruction outside of a kernel: " + text);
    Instruction i;
    i.line = line_;
    i.place = place_;
    std::string rest = text;
    if (rest[0] == '@') {
      const size_t space = rest.find_first_of(" \t");
      i.guard_not = rest[1] == '!';
      i.guard = slot(rest.substr(i.guard_not ? 2 : 1, space - (i.guard_not ? 2 : 1)));
      rest = strip(rest.substr(space));
    }
    const size_t space = rest.find_first_of(" \t");
    const std::string name = rest.substr(0, space);
    const Strings words = split(name, '.');
    const auto found = kOps.find(words[0]);
    if (found == kOps.end()) fail("unknown instruction " + name);
    i.op = found->second;
    modifiers(i, words, name);
    if (space != std::string::npos) operands(i, split(strip(rest.substr(space)), ','), name);
    kernel_->code.push_back(std::move(i));
  }

  void modifiers(Instruction& i, const Strings& words, const std::string& name) {
    static const std::map<std::string, char> modes = {
        {"lo", 'l'},  {"hi", 'h'},  {"wide", 'w'},   {"bfly", 'b'}, {"idx", 'i'}, {"up", 'u'},  {"down", 'd'},
        {"all", 'a'}, {"any", 'y'}, {"ballot", 'b'}, {"rn", 'n'},   {"rz", 'z'},  {"rna", 'a'}, {"rni", 'N'},
        {"rzi", 'Z'}, {"rmi", 'M'}, {"rpi", 'P'},    {"rp", 'p'},   {"rm", 'm'}};
    static const std::map<std::string, Space> spaces = {
        {"global", Space::global}, {"shared", Space::shared}, {"shared::cta", Space::shared}, {"param", Space::param}};
    // What changes nothing here: all memory is coherent, approximations are rounded correctly.
    static const std::map<Op, std::string> plain = {{Op::div, "full approx"},
                                                    {Op::ex2, "approx"},
                                                    {Op::rcp, "approx"},
                                                    {Op::sqrt, "approx"},
                                                    {Op::rsqrt, "approx"},
                                                    {Op::ld, "nc volatile relaxed gpu cta sys"},
                                                    {Op::st, "volatile relaxed gpu cta sys"},
                                                    {Op::atom, "relaxed gpu sys cta"},
                                                    {Op::red, "relaxed gpu sys cta"},
                                                    {Op::bra, "uni"},
                                                    {Op::ret, "uni"},
                                                    {Op::bar, "sync aligned cta"},
                                                    {Op::bar_warp, "sync"},
                                                    {Op::shfl, "sync"},
                                                    {Op::vote, "sync"},
                                                    {Op::cp_async, "async ca cg"},
                                                    {Op::cp_commit, "async"},
                                                    {Op::cp_wait, "async"},
                                                    {Op::ldmatrix, "sync aligned m8n8"},
                                                    {Op::mma, "sync aligned row col"},
                                                    {Op::fence, "sc acq_rel gl gpu sys cta"}};
    std::vector<Type> types;
    for (size_t w = 1; w < words.size(); ++w) {
      const std::string& word = words[w];
      Type type;
      const bool atomic = i.op == Op::atom || i.op == Op::red;
      const auto ignored = plain.find(i.op);
      if (read_type(word, type)) {
        types.push_back(type);
      } else if (auto space = spaces.find(word); space != spaces.end()) {
        if (w == 2 || i.op != Op::cp_async || i.space == Space::generic) i.space = space->second;
      } else if (i.op == Op::setp && kCompare.count(word)) {
        i.compare = kCompare.at(word);
      } else if (i.op == Op::setp && (word == "and" || word == "or" || word == "xor")) {
        i.combine = word[0];
      } else if (atomic && (word == "acquire" || word == "release" || word == "acq_rel")) {
        i.acquire = word != "release";
        i.release = word != "acquire";
      } else if (ignored != plain.end() && (" " + ignored->second + " ").find(" " + word + " ") != std::string::npos) {
        continue;
      } else if (atomic && i.atomic.empty()) {
        i.atomic = word;
      } else if (auto mode = modes.find(word); mode != modes.end()) {
        i.mode = mode->second;
      } else if (word == "v2" || word == "v4" || word == "x1" || word == "x2" || word == "x4") {
        i.vector = word[1] - '0';
      } else if (word == "sat") {
        i.saturate = true;
      } else if (word == "ftz") {
        i.ftz = true;
      } else if (i.op == Op::cvta && word == "to") {
        i.to = true;
      } else if (i.op == Op::ldmatrix && word == "trans") {
        i.trans = true;
      } else if (i.op == Op::mma && word.rfind("m16n8k", 0) == 0) {
        i.k = std::stoi(word.substr(6));
      } else if (i.op == Op::bar && word == "warp") {
        i.op = Op::bar_warp;
      } else if (i.op == Op::cp_async && word == "commit_group") {
        i.op = Op::cp_commit;
      } else if (i.op == Op::cp_async && (word == "wait_group" || word == "wait_all")) {
        i.op = Op::cp_wait;
        i.mode = word[5];
      } else if (word.rfind("L2::", 0) != 0 && word.rfind("L1::", 0) != 0) {
        fail("unknown modifier ." + word + " of " + name);
      }
    }
    if (!types.empty()) i.type = i.from = types[0];
    if (types.size() > 1) i.from = types[1];
    if (i.op == Op::cp_async && (words.size() < 2 || words[1] != "async")) fail("unknown instruction " + name);
    if (i.op == Op::mma && (types.size() != 4 || types[0].kind != 'f')) fail("unknown instruction " + name);
  }

  void operands(Instruction& i, const Strings& texts, const std::string& name) {
    if (i.op == Op::bra) {
      jumps_.emplace_back(int(kernel_->code.size()), texts.at(0));
      return;
    }
    const bool no_result = i.op == Op::st || i.op == Op::bar || i.op == Op::bar_warp || i.op == Op::cp_async ||
                           i.op == Op::cp_wait || i.op == Op::cp_commit || i.op == Op::fence || i.op == Op::red;
    for (size_t t = 0; t < texts.size(); ++t) {
      std::string text = texts[t];
      const bool result = t == 0 && !no_result;
      if (result) {
        const std::string bare = text[0] == '{' ? text.substr(1, text.size() - 2) : text;
        for (const auto& part : split(bare, text[0] == '{' ? ',' : '|')) i.out.push_back(slot(part));
        continue;
      }
      const int first = i.in.size();
      if (text[0] == '[') {
        text = strip(text.substr(1, text.size() - 2));
        const size_t plus = text.find('+');
        if (plus != std::string::npos) {
          const int64_t offset = std::stoll(strip(text.substr(plus + 1)));
          if (i.op == Op::cp_async && t == 1) {
            i.from_offset = offset;
          } else {
            i.offset = offset;
          }
          text = strip(text.substr(0, plus));
        }
      }
      const bool vector = text[0] == '{';
      for (auto part : split(vector ? text.substr(1, text.size() - 2) : text, ',')) {
        i.in_not |= uint32_t(part[0] == '!') << i.in.size();
        i.in.push_back(slot(part[0] == '!' ? strip(part.substr(1)) : part));
      }
      i.operands.push_back({first, i.in.size() - first});
    }
    if (i.op == Op::bar && (texts.size() != 1 || texts[0] != "0")) fail("a barrier other than 0 of all threads");
    if (i.op == Op::bra && texts.size() != 1) fail("unknown instruction " + name);
  }

  Module module_;
  Kernel* kernel_ = nullptr;
  int line_ = 0, depth_ = 0, place_ = -1;
  int64_t shared_end_ = 0, module_shared_ = 0;
  std::map<std::array<int, 3>, int> places_;
  std::map<std::string, int> slots_, labels_;
  std::map<std::pair<int, uint64_t>, int> constants_;
  std::map<std::string, uint64_t> names_, shared_;
  std::vector<std::pair<int, std::string>> jumps_;
};

}  // namespace

Module parse(std::string_view text) { return Parser(text).run(); }

}  // namespace ptx
