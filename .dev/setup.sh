# shellcheck shell=bash
# Set-up shared by every command of ./dev. Sourced, never run. Everything here can be run again, or twice at once.

# The LLVM release that Debian packages, which stands in where the LLVM bundle cannot be downloaded.
SYSTEM_LLVM=22
# NVIDIA's compilers, as packages from PyPI: kernels for GPUs are compiled on machines without one.
CUDA_PACKAGES=(nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvcc==13.0.88)
# Tools that the checks need, at versions that build with the workspace's rust-version.
TYPOS_VERSION=1.52.0
MDBOOK_VERSION=0.5.4
CARGO_DENY_VERSION=0.20.2

say() { printf 'dev: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# True if an HTTPS address answers, redirects followed. Any failure, a missing client included, means no.
reachable() {
  local url=$1 host
  if have curl; then
    curl --head --fail --silent --location --max-time 10 --connect-timeout 5 --output /dev/null "$url" 2>/dev/null
  elif have wget; then
    wget --spider --quiet --tries=1 --timeout=8 "$url" 2>/dev/null
  elif have python3; then
    python3 - "$url" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=8)
PY
  elif have timeout; then
    host=${url#https://}
    # Opens a connection and no more, which is the best that bash does alone.
    # shellcheck disable=SC2016
    timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/443"' _ "${host%%/*}" 2>/dev/null
  else
    return 1
  fi
}

is_installed() { [[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]; }

# apt_install WHY PACKAGE...: installs the packages that are missing, and says so first.
apt_install() {
  local why=$1 package root=()
  local missing=()
  shift
  have apt-get || die "$why needs what Debian and Ubuntu call: $*. There is no apt-get here: install them by hand."
  for package in "$@"; do
    is_installed "$package" || missing+=("$package")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  if [[ $(id -u) -eq 0 ]]; then
    root=(env)
  elif have sudo; then
    root=(sudo env)
  else
    die "$why needs root or sudo. Run as root: apt-get install -y ${missing[*]}"
  fi
  say "installing ${missing[*]} ($why; apt)"
  # A refresh that fails (one mirror down) does not matter if the lists at hand name the packages.
  "${root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 update -qq >&2 ||
    say "apt-get update failed; going on with the package lists at hand"
  "${root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq \
    --no-install-recommends "${missing[@]}" </dev/null >&2 ||
    die "apt could not install ${missing[*]}. Install them by hand, then run this again."
}

# Where the build helper of CubeCL's compilers keeps its LLVM; the version is the one that Cargo.lock names.
llvm_folder() {
  local version data
  version=$(awk -F '"' '$2 == "tracel-llvm-bundler" && /^name/ { getline; print $2; exit }' Cargo.lock)
  [[ -n $version ]] || die "Cargo.lock does not name tracel-llvm-bundler"
  if [[ $(uname -s) == Darwin ]]; then
    data="$HOME/Library/Application Support"
  elif [[ ${XDG_DATA_HOME:-} == /* ]]; then
    data=$XDG_DATA_HOME
  else
    data="$HOME/.local/share"
  fi
  printf '%s/tracel/tracel-llvm-%s\n' "$data" "$version"
}

system_llvm_packages() {
  apt_install "system LLVM for CubeCL's compilers" "llvm-$SYSTEM_LLVM-dev" libzstd-dev zlib1g-dev
}

# CubeCL links LLVM. Its build downloads a bundle from GitHub, and nothing is to be done here. Where GitHub does not
# answer, the system's LLVM is put in the bundle's place: a marker that stops the download, and an llvm-config.
ensure_llvm() {
  local folder marker wrapper config="/usr/lib/llvm-$SYSTEM_LLVM/bin/llvm-config" version url staged
  folder=$(llvm_folder)
  marker="$folder/.tracel-llvm-installed"
  wrapper="$folder/bin/llvm-config"
  if [[ -e $marker ]]; then
    # The marker may have outlived the packages behind it (a cached home directory, say).
    if grep -qsF "$config" "$wrapper" && [[ ! -x $config ]]; then system_llvm_packages; fi
    return 0
  fi
  version=${folder##*/tracel-llvm-}
  url="https://github.com/tracel-ai/tracel-llvm/releases/download/v$version/linux-x64.checksums.json"
  if reachable "$url"; then return 0; fi
  [[ $(uname -s) == Linux ]] || die "CubeCL's LLVM bundle cannot be downloaded from GitHub (no answer from $url)"
  say "GitHub's releases cannot be reached: using the system's LLVM $SYSTEM_LLVM in place of CubeCL's bundle"
  if have apt-get || [[ ! -x $config ]]; then system_llvm_packages; fi
  [[ -x $config ]] || die "$config is missing: install LLVM $SYSTEM_LLVM with its static libraries and headers"
  mkdir -p "$folder/bin"
  staged=$(mktemp "$folder/bin/.llvm-config.XXXXXX")
  # Debian's LLVM names libraries that are not needed, and z3 by its path, which the build helper cannot pass on.
  cat >"$staged" <<WRAPPER
#!/bin/sh
$config "\$@" | sed -e 's#/[^ ]*/libz3\\.so##; s/-lxml2//; s/-lPollyISL//; s/-lPolly//'
WRAPPER
  chmod 755 "$staged"
  mv -f "$staged" "$wrapper"
  # Last, as it is what declares the folder complete. Never touched again: its time stamp would rebuild everything.
  [[ -e $marker ]] || : >"$marker"
}

ensure_toolchain() {
  have cargo || die "cargo is missing: install a Rust toolchain first (https://rustup.rs)"
  # The compilers' shims are C++, and LLVM needs the C++ library at link time.
  if ! have cc || ! have c++; then apt_install "a C and C++ compiler" g++; fi
}

ensure_components() {
  cargo fmt --version >/dev/null 2>&1 || die "rustfmt is missing: rustup component add rustfmt"
  cargo clippy --version >/dev/null 2>&1 || die "Clippy is missing: rustup component add clippy"
}

# A software Vulkan driver, so that the wgpu runtime is tested on machines without a GPU.
ensure_vulkan() {
  local driver
  if [[ -n ${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-} ]]; then return 0; fi
  apt_install "software Vulkan for the wgpu runtime" mesa-vulkan-drivers libvulkan1
  for driver in /usr/share/vulkan/icd.d/lvp_icd*.json; do
    [[ -e $driver ]] || die "no lavapipe driver under /usr/share/vulkan/icd.d; set VK_DRIVER_FILES to a Vulkan driver"
    # The old name of the variable serves loaders older than 1.3.207.
    export VK_DRIVER_FILES=$driver VK_ICD_FILENAMES=$driver
    break
  done
}

# cargo_tool BINARY CRATE VERSION [OPTION..]: builds a tool once, into the tools folder.
cargo_tool() {
  local binary=$1 crate=$2 version=$3
  shift 3
  if [[ "$("$TOOLS/bin/$binary" --version 2>/dev/null)" == *"$version"* ]]; then return 0; fi
  say "installing $binary $version (cargo install, into $TOOLS; once, some minutes)"
  # No optimisation: these run for seconds, so the time to build them counts for more.
  env -u RUSTFLAGS -u RUSTC_WORKSPACE_WRAPPER CARGO_TARGET_DIR="$TOOLS/build" CARGO_PROFILE_RELEASE_LTO=off \
    CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_DEBUG=0 \
    cargo install --quiet --locked --force --root "$TOOLS" --version "$version" "$@" "$crate" </dev/null >&2 ||
    die "could not install $binary $version"
  rm -rf "$TOOLS/build"
}

install_typos() {
  local python="$TOOLS/python"
  if [[ "$("$TOOLS/bin/typos" --version 2>/dev/null)" == *"$TYPOS_VERSION"* ]]; then return 0; fi
  if have python3 && python3 -c 'import ensurepip, venv' 2>/dev/null; then
    say "installing typos $TYPOS_VERSION (a ready binary from PyPI, into $TOOLS)"
    mkdir -p "$TOOLS/bin"
    if python3 -m venv "$python" >&2 && "$python/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps --only-binary :all: "typos==$TYPOS_VERSION" </dev/null >&2; then
      ln -sfn "../python/bin/typos" "$TOOLS/bin/typos"
      return 0
    fi
    say "PyPI has no typos for this machine; building it instead"
  fi
  rm -f "$TOOLS/bin/typos"
  cargo_tool typos typos-cli "$TYPOS_VERSION"
}

# Two runs at once must not install the same tool twice; without flock(1) the last one simply wins.
lock_tools() {
  mkdir -p "$TOOLS/bin"
  if have flock; then
    exec 9>"$TOOLS/.lock"
    flock 9
  fi
}
unlock_tools() { exec 9>&-; }

ensure_typos() { lock_tools; install_typos; unlock_tools; }

# Left to `cargo install`: neither mdbook nor a current cargo-deny comes as a ready package from a package registry.
ensure_mdbook() { lock_tools; cargo_tool mdbook mdbook "$MDBOOK_VERSION" --no-default-features; unlock_tools; }
ensure_cargo_deny() { lock_tools; cargo_tool cargo-deny cargo-deny "$CARGO_DENY_VERSION"; unlock_tools; }

ensure_cuda_compilers() {
  local python="$TOOLS/cuda" wanted="${CUDA_PACKAGES[*]}"
  lock_tools
  if [[ "$(cat "$python/installed" 2>/dev/null)" != "$wanted" ]]; then
    have python3 && python3 -c 'import ensurepip, venv' 2>/dev/null || apt_install "NVIDIA's compilers" python3-venv
    say "installing ${CUDA_PACKAGES[*]} (PyPI, into $TOOLS; once)"
    rm -rf "$python"
    python3 -m venv "$python" >&2 && "$python/bin/python" -m pip install --quiet --disable-pip-version-check \
      --only-binary :all: "${CUDA_PACKAGES[@]}" </dev/null >&2 || die "could not install NVIDIA's compilers"
    printf '%s\n' "$wanted" >"$python/installed"
  fi
  unlock_tools
}
