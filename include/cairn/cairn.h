/* cairn.h - everything: the K/V memory of a transformer on disk, and only the blocks that matter in RAM. */
#ifndef CAIRN_CAIRN_H
#define CAIRN_CAIRN_H

#include <cairn/attention.h>
#include <cairn/base.h>
#include <cairn/context.h>
#include <cairn/index.h>
#include <cairn/model.h>
#include <cairn/store.h>
#include <cairn/train.h>

#endif
