# docker build -t small-gpt .                                      for a CPU
# docker build -t small-gpt --build-arg BASE=pytorch/pytorch:TAG . for a GPU; a TAG with torch 2.11 or newer
#
# What the commands write into checkpoints/ and data/ stays outside of the image:
# docker run -it --rm -v "$PWD/checkpoints:/small-gpt/checkpoints" -v "$PWD/data:/small-gpt/data" small-gpt
ARG BASE=python:3.12-slim
FROM $BASE

# torch.compile wants a compiler
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /small-gpt
COPY requirements.txt requirements-export.txt requirements-serve.txt constraints.txt ./

# A base without torch gets the tested version, for the CPU: without CUDA's libraries it is gigabytes smaller.
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
RUN python -c "import torch" 2> /dev/null \
    || python -m pip install torch -c constraints.txt --index-url https://download.pytorch.org/whl/cpu
RUN python -m pip install -r requirements.txt -r requirements-export.txt -r requirements-serve.txt

COPY . .
CMD ["bash"]
